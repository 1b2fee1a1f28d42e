"""What a policy does to the answers: scored one decode step at a time, against the exact run.

Knows: engines, policies, texts as tokens, problems with one right answer. Does not know: terminals,
what a policy does, how intervals are drawn (`intervals`). Scoring whole windows in one forward (as
`evaluate` does for formats) would hide what a policy does: it acts while decoding, and on the cache
that a step really has.

    prompt of P tokens in one forward (always exact) -> N real tokens, fed one by one
    each step's distribution -> NLL of the real token, KL from the exact run, same favourite

Every figure is per decoded token. The cache goes on from text to text, as it does in use: the order
of the texts belongs to the exam. With speculation it also depends on when reads end, so the figures
of a lossy policy that prefetches differ a little from run to run; all others are the same again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from understudy import intervals, tasks, texts
from understudy import plan as planning
from understudy.bench import ON_DEMAND, Policy, total
from understudy.checkpoint import Checkpoint
from understudy.core import Counters, NotEnoughDisk, UnderstudyError
from understudy.engine import Engine, inspect, tokenizer_in
from understudy.evaluate import compared
from understudy.intervals import Figure, Numbers
from understudy.native import cache_folder
from understudy.policies.matched import AtRate
from understudy.registry import parse

LEAST_SETS = 5
CHARACTERS = 40  # of text per token that are encoded at most: more than any text needs
OPEN_END = 3  # tokens beyond the right answer's that an answer may take (as in training/report.py)

Report = Callable[[int, int], None]  # (done, in all)
Bar = Callable[[str], Report]


# ------------------------------------------------------------------------------------- material


@dataclass(frozen=True, slots=True)
class Text:
    """One sequence to score: ``prompt`` tokens are read, the rest is decoded as dictated."""

    domain: str
    number: int  # of its prompt set
    ids: tuple[int, ...]
    prompt: int

    @property
    def scored(self) -> int:
        """Decode steps: the first token after the prompt comes of the prompt's own forward."""
        return len(self.ids) - self.prompt - 1


def prompt_sets(
    tokenizer: Any, domains: Mapping[str, str], *, sets: int, prompt: int, scored: int
) -> list[Text]:
    """``sets`` pieces of each domain, spread evenly over it; a set is one piece of every domain.
    No two pieces share a character: sets are what the intervals take for independent."""
    if sets < LEAST_SETS:
        raise UnderstudyError(f"--sets must be at least {LEAST_SETS}, else intervals mean nothing")
    length, found = prompt + scored + 1, []
    for domain, text in domains.items():
        bounds = [len(text) * number // sets for number in range(sets + 1)]
        for number in range(sets):
            share = text[bounds[number] : bounds[number + 1]]
            ids = tokenizer(_from_a_word(share)[: CHARACTERS * length]).input_ids[:length]
            if len(ids) < length:
                raise UnderstudyError(
                    f"{domain}: too short for {sets} pieces of {length} tokens; ask for fewer "
                    "--sets, --tokens or --prompt-tokens, or name a longer file"
                )
            found.append(Text(domain, number, tuple(map(int, ids)), prompt))
    return sorted(found, key=lambda one: one.number)


def _from_a_word(text: str) -> str:
    """Without the part of a word it may begin with, where words are told apart by spaces."""
    _, _, rest = text[:CHARACTERS].partition(" ")
    return rest + text[CHARACTERS:] if rest else text


def questions(each: int, seed: int) -> list[tasks.Problem]:
    """``each`` held-out problems of every kind, its levels in turn, from easy to longer than any
    that the reference models were trained on: damage shows where a task is neither easy nor lost.
    """
    found = []
    for task, levels in tasks.LEVELS.items():
        every = levels + tasks.LONGER.get(task, ())
        pools = [tasks.held_problems(task, level, each, seed) for level in every]
        turns = [pool[turn] for turn in range(each) for pool in pools if turn < len(pool)]
        found += turns[:each]
    return found


# -------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True, slots=True)
class Scored:
    """One text under one policy: one number per decoded token."""

    text: Text
    nll: Numbers
    kl: Numbers
    same: Numbers
    counters: Counters
    seconds: float  # of its decode steps


@dataclass(slots=True)
class Scores:
    """All texts and problems under one policy. ``identical``: every logit has the bits of the exact
    run; ``right``: one per problem, 1 or 0."""

    texts: list[Scored] = field(default_factory=list)
    right: list[float] = field(default_factory=list)
    identical: bool = True

    @property
    def tokens(self) -> int:
        return sum(len(one.nll) for one in self.texts)


class Exact:
    """The exact run's logits, in a file: with a large vocabulary they would fill the memory that
    the budget promises to others."""

    def __init__(self, folder: Path, texts: Sequence[Text]) -> None:
        self.texts, self._folder = texts, folder
        self._rows: np.memmap[Any, Any] | None = None

    def keep(self, number: int, logits: torch.Tensor) -> None:
        """Of one text: the prompt's last position, then every decode step."""
        if self._rows is None:
            shape = (sum(one.scored + 1 for one in self.texts), logits.shape[1])
            _require_room(self._folder, 4 * shape[0] * shape[1])
            self._rows = np.memmap(self._folder / "exact", np.float32, "w+", shape=shape)
        self._rows[self._places[number]] = logits.numpy()

    def of(self, number: int) -> torch.Tensor:
        """The same rows again."""
        assert self._rows is not None, "the exact run comes first"
        return torch.from_numpy(np.array(self._rows[self._places[number]]))

    @cached_property
    def _places(self) -> list[slice]:
        ends = np.cumsum([one.scored + 1 for one in self.texts]).tolist()
        return [slice(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def _require_room(folder: Path, needed: int) -> None:
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise NotEnoughDisk(
            f"the exact run's logits need {planning.shown_size(needed)} and "
            f"{planning.shown_size(free)} are free in {folder.parent}: make room there, name "
            "another folder in UNDERSTUDY_CACHE, or ask for fewer --sets or --tokens"
        )


@contextmanager
def exact_run(texts: Sequence[Text]) -> Iterator[Exact]:
    """Room for the exact run's logits; the file goes when the block ends."""
    cache = cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        room = TemporaryDirectory(prefix="exact-run-", dir=cache)
    except OSError as e:
        raise UnderstudyError(
            f"cannot write in {cache}: {e.strerror}; name another folder in UNDERSTUDY_CACHE"
        ) from e
    with room as folder:
        yield Exact(Path(folder), texts)


def score(
    engine: Engine, exact: Exact, problems: Sequence[tasks.Problem], report: Report, *, first: bool
) -> Scores:
    """Run all texts and problems. ``first``: this is the exact run, and is kept."""
    found, everything = Scores(), len(exact.texts) + len(problems)
    for number, text in enumerate(exact.texts):
        logits, scored = _decode(engine, text)
        if first:
            exact.keep(number, logits)
        reference = exact.of(number)
        found.identical = found.identical and torch.equal(reference, logits)
        rows = compared(reference[1:], logits[1:], torch.tensor(text.ids[-text.scored :]))
        found.texts.append(replace(scored, nll=rows.other, kl=rows.kl, same=rows.same))
        report(number + 1, everything)
    for problem in problems:
        found.right.append(float(solved(engine, problem)))
        report(len(exact.texts) + len(found.right), everything)
    return found


_NOTHING = np.zeros(0)


def _decode(engine: Engine, text: Text) -> tuple[torch.Tensor, Scored]:
    """The logits of the prompt's last position and of every decode step, and what they cost."""
    answer = text.ids[text.prompt :]
    made = engine.generate(
        text.ids[: text.prompt],
        max_new_tokens=len(answer),
        dictated=answer,
        ignore_eos=True,
        keep_logits=True,
    )
    assert made.logits is not None
    logits = torch.stack(made.logits).float()
    seconds = made.tpot * text.scored
    return logits, Scored(text, _NOTHING, _NOTHING, _NOTHING, made.decode_counters, seconds)


def solved(engine: Engine, problem: tasks.Problem) -> bool:
    """Whether the first line of the greedy answer to the bare question is the right one."""
    longest = len(engine.encode(problem.answer)) + OPEN_END
    made = engine.generate(tasks.ask(problem.prompt), max_new_tokens=longest)
    return made.text.strip().split("\n")[0].strip() == problem.answer


# -------------------------------------------------------------------------------------- figures


@dataclass(frozen=True, slots=True)
class Piece:
    """One text under one policy, in enough detail to draw the intervals again: sums per block of
    `intervals.BLOCK` tokens (the last may be shorter)."""

    domain: str
    set: int
    tokens: int
    delta_nll: list[float]
    kl: list[float]
    same_top1: list[float]
    changed: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Solved:
    """Problems of one kind, or of all: shares that were right, and the paired difference."""

    problems: int
    right: float
    right_exact: float
    delta: Figure


@dataclass(frozen=True, slots=True)
class Verdict:
    """One policy, compared. Nats, bytes, seconds and counts per decoded token. ``nll_by_domain``:
    what is lost there; ``solved``: by kind of problem, and ``all``. ``format``: the experts are in
    fewer bits than the exact run's. ``equivalent``: it may round otherwise, and nothing else."""

    policy: str
    exact: bool
    equivalent: bool
    format: bool
    identical: bool
    tokens: int
    nll: float
    delta_nll: Figure
    kl: Figure
    same_top1: Figure
    nll_by_domain: dict[str, Figure]
    solved: dict[str, Solved]
    substituted: float
    skipped: float
    substituted_mass: float
    skipped_mass: float
    bytes: float
    hit_rate: float
    stall: float
    seconds: float
    right: list[int]
    pieces: list[Piece]

    @property
    def changed(self) -> float:
        """Expert slots of a token that did not run as routed."""
        return self.substituted + self.skipped

    @property
    def lossy(self) -> bool:
        return not self.exact and not self.equivalent

    @property
    def never_acted(self) -> bool:
        """A lossy policy that changed nothing: its figures say nothing about it."""
        return self.lossy and not self.format and not self.changed and self.identical

    @property
    def uncounted(self) -> bool:
        """It changed something, but never who runs: weights only."""
        return self.lossy and not self.format and not self.changed and not self.identical

    @property
    def broken(self) -> bool:
        """It says that it is exact, and is not."""
        return self.exact and not self.identical


def compare(
    policy: Policy, problems: Sequence[tasks.Problem], exact: Scores, own: Scores,
    *, format: bool = False,
) -> Verdict:  # fmt: skip
    """What ``own`` differs by from the exact run."""
    lost = [mine.nll - theirs.nll for mine, theirs in zip(own.texts, exact.texts, strict=True)]
    owners = [one.text for one in own.texts]
    return Verdict(
        policy=policy.name,
        exact=policy.exact and not format,
        equivalent=policy.equivalent and not format,
        format=format,
        identical=own.identical,
        tokens=own.tokens,
        nll=float(np.concatenate([one.nll for one in own.texts]).mean()),
        delta_nll=_figure(lost, owners),
        kl=_figure([one.kl for one in own.texts], owners),
        same_top1=_figure([one.same for one in own.texts], owners),
        nll_by_domain={
            domain: _figure(lost, owners, domain)
            for domain in dict.fromkeys(one.domain for one in owners)
        },
        solved=_solved(problems, exact.right, own.right),
        **_costs(own),
        right=[int(one) for one in own.right],
        pieces=[_piece(one, delta) for one, delta in zip(own.texts, lost, strict=True)],
    )


def paired(one: Verdict, other: Verdict) -> Figure:
    """NLL lost under ``one`` less that under ``other``, on the same tokens."""
    sets: dict[int, list[tuple[Numbers, Numbers]]] = {}
    for mine, theirs in zip(one.pieces, other.pieces, strict=True):
        sums = np.array(mine.delta_nll) - np.array(theirs.delta_nll)
        sets.setdefault(mine.set, []).append((sums, intervals.sizes(mine.tokens)))
    return intervals.over_blocks(list(sets.values()))


def _costs(own: Scores) -> dict[str, float]:
    """Counters and times, per decoded token."""
    c, n = total(one.counters for one in own.texts), own.tokens
    per_token = {
        "substituted": c.substituted,
        "skipped": c.skipped,
        "substituted_mass": c.substituted_mass,
        "skipped_mass": c.skipped_mass,
        "bytes": c.bytes_read,
        "stall": c.stall_seconds,
        "seconds": sum(one.seconds for one in own.texts),
    }
    shares = {name: value / n for name, value in per_token.items()}
    return {**shares, "hit_rate": c.hits / max(1, c.lookups)}


def _figure(values: Sequence[Numbers], owners: Sequence[Text], domain: str | None = None) -> Figure:
    """Of one number per decoded token of each text; of one domain, if named."""
    sets: dict[int, list[Numbers]] = {}
    for numbers, text in zip(values, owners, strict=True):
        if domain in (None, text.domain):
            sets.setdefault(text.number, []).append(numbers)
    return intervals.over_sets(list(sets.values()))


def _piece(one: Scored, lost: Numbers) -> Piece:
    c = one.counters
    return Piece(
        domain=one.text.domain,
        set=one.text.number,
        tokens=len(one.nll),
        delta_nll=intervals.block_sums(lost),
        kl=intervals.block_sums(one.kl),
        same_top1=intervals.block_sums(one.same),
        changed=c.substituted + c.skipped,
        bytes=c.bytes_read,
    )


def _solved(
    problems: Sequence[tasks.Problem], exact: Sequence[float], own: Sequence[float]
) -> dict[str, Solved]:
    """By kind, and together under ``all``; empty where nothing was asked."""
    kinds: dict[str, list[tuple[float, float]]] = {}
    for problem, theirs, mine in zip(problems, exact, own, strict=True):
        kinds.setdefault(problem.task, []).append((theirs, mine))
    pairs = {task: np.array(rows) for task, rows in kinds.items()}
    found = {task: _share([rows]) for task, rows in pairs.items()}
    return {"all": _share(list(pairs.values())), **found} if pairs else {}


def _share(kinds: Sequence[Numbers]) -> Solved:
    """``kinds``: per kind rows of (right in the exact run, right here)."""
    theirs, mine = np.concatenate(kinds).T
    delta = intervals.over_problems([rows[:, 1] - rows[:, 0] for rows in kinds])
    return Solved(len(mine), float(mine.mean()), float(theirs.mean()), delta)


# ------------------------------------------------------------------------------------- the whole


@dataclass(frozen=True, slots=True)
class Exam:
    """What every policy is put through. ``memory``: of each engine in turn, told in bytes once the
    session has begun; ``problems``: of each kind; ``settings``: further options of the engine."""

    model: str
    memory: str | int
    data: tuple[str, ...] = ()
    sets: int = LEAST_SETS
    prompt: int = 64
    scored: int = 128
    problems: int = 0
    seed: int = 0
    settings: tuple[tuple[str, Any], ...] = ()

    def in_bytes(self) -> Exam:
        """With a budget that means the same for every engine: a share is one of *this* checkpoint,
        also where fewer bits are compared, and what is free changes from one to the next."""
        if self.memory == "auto":
            free = planning.automatic_budget(planning.free_memory())
            return replace(self, memory=free)
        nbytes = Checkpoint.open(self.model).nbytes
        return replace(self, memory=planning.parse_memory(self.memory, nbytes))

    def open(self, policy: Policy, model: str | None = None) -> Engine:
        options = {**dict(self.settings), **policy.options(), "seed": self.seed}
        return Engine(model or self.model, memory=self.memory, **options)


class Session:
    """The exact run once, then any number of policies against it."""

    def __init__(self, exam: Exam, exact: Exact, report: Report) -> None:
        self.exam, self._exact = exam, exact
        self.problems = questions(exam.problems, exam.seed)
        with exam.open(ON_DEMAND) as engine:
            self._held_bytes = engine.plan.slots * engine.plan.slot_bytes
            self.baseline = score(engine, exact, self.problems, report, first=True)

    @property
    def texts(self) -> Sequence[Text]:
        return self._exact.texts

    def judge(
        self, policy: Policy, report: Report, model: str | None = None, rate: float | None = None
    ) -> Verdict:
        """``model``: another checkpoint of the same model (fewer bits) in its place. ``rate``: a
        control, held to so many changed experts per token (see `policies.matched`)."""
        if model is not None and dict(self.exam.settings).get("slots") is not None:
            # Slots were told, not memory: as many of the smaller ones as the same bytes hold.
            policy = replace(policy, slots=self._held_bytes // inspect(model).slot_bytes)
        with self.exam.open(policy, model) as engine:
            if rate is not None:
                director = engine.model.understudy.runtime.director
                director.route = AtRate(director.route, rate)
            own = score(engine, self._exact, self.problems, report, first=False)
        return compare(policy, self.problems, self.baseline, own, format=model is not None)

    def baseline_verdict(self) -> Verdict:
        return compare(ON_DEMAND, self.problems, self.baseline, self.baseline)


@contextmanager
def session(exam: Exam, report: Report) -> Iterator[Session]:
    """Opens the exam: cuts the texts, runs the exact run."""
    pieces = prompt_sets(
        tokenizer_in(Checkpoint.open(exam.model).path),
        texts.domains(exam.data),
        sets=exam.sets,
        prompt=exam.prompt,
        scored=exam.scored,
    )
    with exact_run(pieces) as exact:
        yield Session(exam.in_bytes(), exact, report)


# ---------------------------------------------------------------------------------- the controls


def controls(policy: Policy) -> list[Policy]:
    """For `buddy`: the same gates with a random resident expert, and with nobody, in its place.
    To be judged at the rate of what they control for: the gates alone do not match the count."""
    name, parameters = parse(policy.route)
    if name != "buddy" or parameters.get("stand_in") in ("random", "drop"):
        return []
    told = "".join(f":{key}={value}" for key, value in parameters.items() if key != "stand_in")
    return [
        replace(policy, name=f"{policy.name} ({who})", route=f"{name}:stand_in={who}{told}")
        for who in ("random", "drop")
    ]


def packed(model: str, format: str, bar: Bar) -> Path:
    """``model`` with its experts in fewer bits, packed now if it is not in the cache."""
    from understudy import packing

    checkpoint = Checkpoint.open(model)
    digest = hashlib.sha256()
    for file in sorted(checkpoint.files):
        stat = file.stat()
        digest.update(repr((str(file), stat.st_size, stat.st_mtime_ns)).encode())
    name = f"{checkpoint.path.name}-{digest.hexdigest()[:8]}-{format}"
    folder = cache_folder() / "fewer-bits" / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        packing.pack(model, format, folder, bar=bar)
    return folder
