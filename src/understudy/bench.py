"""Policies timed side by side: alternating rounds, medians, floors, one machine, one run.

Knows: what a policy's name stands for, how rounds alternate, and what a floor is.
Does not know: terminals. Callers give it a function that is told how far it has come.

Two floors bound a decode step from below. ``own``: the bytes this policy needed from disk / the
disk's bandwidth. ``belady``: the bytes a clairvoyant would need with the same slots / the same
bandwidth. Reading the touched weights from memory overlaps with the disk, so each floor is the
larger of the two times, never their sum.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from statistics import median, stdev
from typing import TYPE_CHECKING, Any

from understudy import plan as planning
from understudy import texts
from understudy.core import Counters, LayerEvent, Phase, UnderstudyError, UnknownName
from understudy.registry import (
    EVICTORS,
    PREDICTORS,
    RESOLVERS,
    ROUTES,
    exactness,
    parse,
    require,
)

if TYPE_CHECKING:
    from understudy.engine import Engine, Generation

Report = Callable[[int, int], None]  # (done, in all)

# ------------------------------------------------------------------------------------- policies


@dataclass(frozen=True, slots=True)
class Policy:
    """Who leaves, who comes early, who runs, what a miss does, and whether there is a cache."""

    name: str
    evictor: str = "lrfu"
    predictor: str = "none"
    slots: int | str | None = None  # None: as many as the budget holds; "2k": see `Options`
    route: str = "as-routed"
    resolver: str = "fetch"
    self_switch: bool = True

    @classmethod
    def parse(cls, text: str) -> Policy:
        """A preset's name, or ``NAME+NAME+...``, each an evictor, a predictor, a route or a
        resolver, in any order, at most one of each kind; parameters as ``NAME:key=value``."""
        name = text.strip()
        if name in PRESETS:
            return PRESETS[name]
        parts: dict[str, str] = {}
        for part in name.split("+"):
            kind = _kind_of(part)
            if kind in parts:
                raise UnderstudyError(f"policy {name!r} names two kinds of {kind}; leave one out")
            parts[kind] = part
        policy = cls(name, **parts)  # type: ignore[arg-type]
        require(policy.evictor, policy.predictor, policy.route, policy.resolver)
        return policy

    @property
    def exactness(self) -> str:
        """What it may do to the output: one of `registry.CLASSES`."""
        return exactness(self.route, self.resolver)

    @property
    def exact(self) -> bool:
        """Whether nothing in it may change a bit of what is computed."""
        return self.exactness == "bit-exact"

    @property
    def equivalent(self) -> bool:
        """Whether it may round otherwise, and nothing else."""
        return self.exactness == "equivalent"

    @property
    def needs_profile(self) -> bool:
        """Whether it cannot run on what the model alone says."""
        foresight = PREDICTORS.get(parse(self.predictor)[0]).foresight
        return parse(self.route)[0] == "buddy" or foresight not in ("router-input", "drift")

    def options(self) -> dict[str, Any]:
        """For `Engine`."""
        names = "evictor", "predictor", "route", "resolver", "self_switch"
        told = {name: getattr(self, name) for name in names}
        return told if self.slots is None else {**told, "slots": self.slots}


_KINDS = {"evictor": EVICTORS, "predictor": PREDICTORS, "route": ROUTES, "resolver": RESOLVERS}


def _kind_of(part: str) -> str:
    name = parse(part)[0]
    for kind, registry in _KINDS.items():
        if name in registry.names():
            return kind
    known = [*PRESETS, *(name for registry in _KINDS.values() for name in registry.names())]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise UnknownName(f"no policy named {name!r}{hint} Known: {', '.join(known)}")


NO_CACHE = Policy("no-cache", "lru", slots=planning.MINIMUM_SLOTS)
LRU = Policy("lru", "lru")
ON_DEMAND = Policy("on-demand")
UNDERSTUDY = Policy("understudy", predictor="next-gate")
# Speculating Experts as published keeps no expert: two layers' worth of buffers, all copied anew
# for every token. `paper` executes what it speculated, `paper-hint` only fetches it early.
_PAPER: dict[str, Any] = {"evictor": "lru-global", "slots": "2k", "self_switch": False}
PRESETS = {
    policy.name: policy
    for policy in (
        NO_CACHE,
        LRU,
        ON_DEMAND,
        UNDERSTUDY,
        Policy("hint-quasi", predictor="quasi-gate"),
        Policy("hint-estimator", predictor="estimator"),
        Policy("hint-hybrid", predictor="hybrid"),
        Policy("paper-on-demand", **_PAPER),
        Policy("paper-hint", predictor="quasi-gate", **_PAPER),
        Policy("paper", predictor="quasi-gate", route="speculated", **_PAPER),
        Policy("paper-estimator", predictor="estimator", route="speculated", **_PAPER),
        Policy("paper-hybrid", predictor="hybrid", route="speculated", **_PAPER),
        Policy("speculated", predictor="quasi-gate", route="speculated", self_switch=False),
        Policy("verified", predictor="next-gate", route="verified", self_switch=False),
        Policy("buddy", route="buddy"),
        Policy("buddy-similar", route="buddy:stand_in=similar"),
        Policy("buddy-random", route="buddy:stand_in=random"),
        Policy("buddy-drop", route="buddy:stand_in=drop"),
    )
}


@contextmanager
def open_all(
    model: str, policies: Sequence[Policy], memory: str | int = "auto", **settings: Any
) -> Iterator[dict[str, Engine]]:
    """One engine per policy, all at once: alternating must not pay for loading.

    Each has the whole budget; ``auto`` is divided by their number. Budgets that do not fit beside
    each other are an error, because a machine that swaps measures nothing.
    """
    from understudy.engine import Engine

    if memory == "auto":
        memory = planning.automatic_budget(planning.free_memory()) // len(policies)
    engines: dict[str, Engine] = {}
    with ExitStack() as stack:
        for number, policy in enumerate(policies):
            engine = Engine(model, memory=memory, **{**settings, **policy.options()})
            engines[policy.name] = stack.enter_context(engine)
            if number == 0:
                _check_room(engine.plan, policies)
        yield engines


def _check_room(first: planning.Plan, policies: Sequence[Policy]) -> None:
    """Whether the engines still to be opened fit into what is free now."""
    fixed = first.used - first.slots * first.slot_bytes
    room = (first.total - fixed) // first.slot_bytes
    wanted = [min(first.experts, _slots(policy, first) or room) for policy in policies[1:]]
    needed = sum(fixed + slots * first.slot_bytes for slots in wanted)
    free = planning.free_memory()
    if needed > free:
        fair = planning.automatic_budget(free) // len(policies)
        raise UnderstudyError(
            f"{len(policies)} policies side by side need {planning.shown_size(needed)} more and "
            f"{planning.shown_size(free)} are free; try --memory {max(1, fair // planning.MIB)}MiB"
        )


def _slots(policy: Policy, plan: planning.Plan) -> int | None:
    return plan.slots if isinstance(policy.slots, str) else policy.slots


# --------------------------------------------------------------------------------------- rounds


def prompts(engine: Engine, count: int, length: int) -> list[list[int]]:
    """``count`` different pieces of real text of ``length`` tokens each."""
    ids = engine.encode(texts.python_docs()[: 40 * count * length])
    while len(ids) < count * length:
        ids = ids + ids
    return [ids[i * length : (i + 1) * length] for i in range(count)]


@dataclass(slots=True)
class Timed:
    """What one policy did: a generation per round, and the routing it saw."""

    generations: list[Generation] = field(default_factory=list)
    events: list[list[LayerEvent]] = field(default_factory=list)


def alternate(
    engines: dict[str, Engine],
    rounds: Sequence[Sequence[int]],
    new_tokens: int,
    report: Report = lambda done, total: None,
    between: Callable[[], None] = lambda: None,
    keep_logits: bool = False,
    dictated: bool = False,
) -> dict[str, Timed]:
    """A B C A B C ...: in each round every engine continues the same prompt.

    The first prompt warms every cache and is not counted. ``between`` is called once per round
    (it measures the disk while the machine is in the same mood). ``dictated``: the last
    ``new_tokens`` of a prompt are not read but answered with, so that policies that would say
    something else decode the same text.
    """
    results = {name: Timed() for name in engines}
    total, done = len(rounds) * len(engines), 0
    for number, prompt in enumerate(rounds):
        for name, engine in engines.items():
            read = len(prompt) - new_tokens if dictated else len(prompt)
            engine.start_recording()
            generation = engine.generate(
                list(prompt[:read]),
                max_new_tokens=new_tokens,
                ignore_eos=True,
                keep_logits=keep_logits,
                dictated=prompt[read:],
            )
            events = engine.stop_recording()
            if number > 0:
                results[name].generations.append(generation)
                results[name].events.append(events)
            done += 1
            report(done, total)
        between()
    return results


# --------------------------------------------------------------------------------------- floors


@dataclass(slots=True)
class Rates:
    """How fast this machine read during the run, bytes per second: the best seen of each.

    The best, because a floor must never be higher than what the machine can do.
    """

    engine: Engine
    threads: int = 4
    disk: float = 0.0
    memory: float = 0.0

    def measure(self) -> None:
        """One short look at disk and memory; called between rounds."""
        block = max(planning.MIB, min(8 * planning.MIB, self.engine.plan.expert_bytes))
        largest = max(self.engine.checkpoint.files, key=lambda file: file.stat().st_size)
        size = min(block, largest.stat().st_size)
        for direct in (True, False):
            speed = planning.disk_bandwidth(largest, self.threads, size, 128 * planning.MIB, direct)
            if speed is not None:
                self.disk = max(self.disk, speed)
                break
        self.memory = max(self.memory, planning.memory_bandwidth(repeats=1))

    def floor(self, disk_bytes: float, memory_bytes: float) -> float:
        """Seconds that no program can beat."""
        link = disk_bytes / self.disk if self.disk else 0.0
        return max(link, memory_bytes / self.memory if self.memory else 0.0)


def clairvoyant_bytes(events: Sequence[LayerEvent], plan: planning.Plan, phase: Phase) -> int:
    """Bytes that an evictor who knows the future would read for one request's ``phase``."""
    from understudy.simulate import replay

    layers = 1 + max((event.layer for event in events), default=0)
    prefill = sum(event.phase is Phase.PREFILL for event in events)
    chosen, first = (events[:prefill], 0) if phase is Phase.PREFILL else (events, prefill)
    if first == len(chosen):
        return 0
    counted = replay(chosen, slots=plan.slots, layers=layers, evictor="belady", from_event=first)
    return counted.misses * plan.expert_bytes


# ----------------------------------------------------------------------------------------- rows


@dataclass(frozen=True, slots=True)
class Spread:
    """A median with what lies around it."""

    median: float
    low: float
    high: float
    deviation: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        deviation = stdev(values) if len(values) > 1 else 0.0
        return cls(median(values), min(values), max(values), deviation)


@dataclass(frozen=True, slots=True)
class Row:
    """One policy in one phase. Seconds and bytes are per token; counters are of all rounds."""

    policy: str
    phase: Phase
    tokens: int  # of one round
    all_seconds: tuple[float, ...]  # one per round
    bytes: float
    stall: float
    counters: Counters
    floor_own: float
    floor_belady: float

    @property
    def seconds(self) -> Spread:
        return Spread.of(self.all_seconds)

    @property
    def rate(self) -> Spread:
        """Tokens per second."""
        return Spread.of([1 / seconds for seconds in self.all_seconds if seconds > 0] or [0.0])

    @property
    def name(self) -> str:
        return f"{'pp' if self.phase is Phase.PREFILL else 'tg'}{self.tokens}"


def row(name: str, timed: Timed, engine: Engine, rates: Rates, phase: Phase) -> Row:
    """What ``timed`` says about one phase."""
    parts = [_part(generation, phase) for generation in timed.generations]
    tokens = [count for count, _, _ in parts]
    counters = total(counted for _, _, counted in parts)
    everything = max(1, sum(tokens))
    needed = max(0, counters.bytes_read - counters.wasted_bytes)
    steps = everything if phase is Phase.DECODE else len(parts)
    dense = engine.plan.dense * steps / everything
    memory = dense + counters.lookups * engine.plan.expert_bytes / everything
    best = sum(clairvoyant_bytes(events, engine.plan, phase) for events in timed.events)
    return Row(
        policy=name,
        phase=phase,
        tokens=max(tokens),
        all_seconds=tuple(seconds / max(1, count) for count, seconds, _ in parts),
        bytes=counters.bytes_read / everything,
        stall=counters.stall_seconds / everything,
        counters=counters,
        floor_own=rates.floor(needed / everything, memory),
        floor_belady=rates.floor(best / everything, memory),
    )


def _part(generation: Generation, phase: Phase) -> tuple[int, float, Counters]:
    """Tokens, seconds and counters of one phase of one generation."""
    if phase is Phase.PREFILL:
        counters = generation.counters - generation.decode_counters
        return generation.prompt_tokens, generation.ttft, counters
    later = len(generation.tokens) - 1
    return later, generation.tpot * later, generation.decode_counters


def total(parts: Iterable[Counters]) -> Counters:
    """Their sum."""
    total = Counters()
    for part in parts:
        total = total - (Counters() - part)
    return total


def measure(
    engines: dict[str, Engine],
    prompt_tokens: int,
    new_tokens: int,
    repeats: int,
    report: Report = lambda done, total: None,
    io_threads: int = 4,
) -> tuple[list[Row], Rates]:
    """The rows of ``understudy bench``: prompt processing and text generation for each policy."""
    some = next(iter(engines.values()))
    rates = Rates(some, io_threads)
    rates.measure()
    rounds = prompts(some, repeats + 1, prompt_tokens)
    results = alternate(engines, rounds, new_tokens + 1, report, rates.measure)
    rows = [
        row(name, results[name], engines[name], rates, phase)
        for phase in (Phase.PREFILL, Phase.DECODE)
        for name in engines
    ]
    return rows, rates
