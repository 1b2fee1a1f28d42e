"""Carries plans out on a virtual clock, in the order of the engine's runtime.

Knows: events, the director, the virtual link. Does not know: files, tensors, models, real time.
Every policy object is the engine's own; `tests/unit/test_agreement.py` holds this file and
`experts.runtime` to the same hits, evictions and bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from operator import attrgetter
from statistics import mean, median

from understudy.core import (
    Costs,
    Counters,
    ExpertId,
    LayerEvent,
    LayerPlan,
    Load,
    Phase,
    UnderstudyError,
)
from understudy.policies import Evictor, Learned, MissResolver, Predictor, RouteTransform
from understudy.policies.director import Director
from understudy.policies.predict import NoPrediction, SelfSwitch
from understudy.policies.residency import Residency, State
from understudy.registry import EVICTORS, ORACLES, PREDICTORS, RESOLVERS, ROUTES
from understudy.simulate.link import Link, Machine

Report = Callable[[int, int], None]  # (done, in all)

_REPORT_EVERY = 4096


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many experts each MoE layer has, and the bytes of one of them. ``largest`` is what a slot
    takes: slots are all alike, as in the engine's arena."""

    experts: tuple[int, ...]
    nbytes: tuple[int, ...]

    @property
    def layers(self) -> int:
        return len(self.experts)

    @property
    def count(self) -> int:
        return sum(self.experts)

    @property
    def total(self) -> int:
        return sum(n * size for n, size in zip(self.experts, self.nbytes, strict=True))

    @property
    def largest(self) -> int:
        return max(self.nbytes)

    def of(self, expert: ExpertId) -> int:
        return self.nbytes[expert.layer]

    def slots(self, budget: int) -> int:
        """How many experts ``budget`` bytes hold."""
        return min(self.count, budget // self.largest)


@dataclass(frozen=True, slots=True)
class Minds:
    """The names of the policies, as the engine takes them."""

    evictor: str = "lrfu"
    predictor: str = "none"
    route: str = "as-routed"
    resolver: str = "fetch"
    depth: int = 1
    self_switch: bool = True
    learned: Learned | None = None
    seed: int = 0

    def director(self, sizes: Sizes, slots: int, future: Sequence[LayerEvent]) -> Director:
        """Wired as the engine wires it. ``future``: what an oracle is shown."""
        return Director(
            Residency(slots),
            evictor=self._evictor(sizes, slots, future),
            predictor=self._predictor(sizes),
            resolver=RESOLVERS.make(self.resolver),
            route=ROUTES.make(
                self.route,
                layers=sizes.layers,
                experts=sizes.experts,
                learned=self.learned,
                seed=self.seed,
            ),
            switch=SelfSwitch(
                enabled=self.predictor != "none" and slots < sizes.count, adaptive=self.self_switch
            ),
            nbytes=sizes.of,
            ample=slots >= sizes.count,
        )

    def _evictor(self, sizes: Sizes, slots: int, future: Sequence[LayerEvent]) -> Evictor:
        shown = {"future": future} if self.evictor in ORACLES else {}
        found: Evictor = EVICTORS.make(self.evictor, slots=slots, layers=sizes.layers, **shown)
        return found

    def _predictor(self, sizes: Sizes) -> Predictor:
        found: Predictor = PREDICTORS.make(
            self.predictor, layers=sizes.layers, experts=sizes.experts, depth=self.depth
        )
        return found


@dataclass(slots=True)
class Outcome:
    """What one run did. Seconds are virtual; a step is one forward that decodes.

    ``decode``: the share of ``counters`` that belongs to decode steps. ``decode_compute``: seconds
    of them that were not stall, which no other policy could have saved.
    """

    slots: int
    counters: Counters = field(default_factory=Counters)
    decode: Counters = field(default_factory=Counters)
    steps: list[float] = field(default_factory=list)  # seconds of each decode step
    prompts: list[float] = field(default_factory=list)  # seconds of each prompt
    decode_compute: float = 0.0

    @property
    def tpot(self) -> float:
        """Median seconds of a decode step."""
        return median(self.steps) if self.steps else 0.0

    @property
    def tpot_mean(self) -> float:
        return mean(self.steps) if self.steps else 0.0

    @property
    def ttft(self) -> float:
        """Median seconds of a prompt."""
        return median(self.prompts) if self.prompts else 0.0

    @property
    def hit_rate(self) -> float:
        """Of all lookups, prompt and decode. A late hit was not there in time, and is none."""
        return _share(self.counters)

    @property
    def hit_rate_decode(self) -> float:
        return _share(self.decode)

    @property
    def bytes_per_token(self) -> float:
        """Bytes read per decoded token, useful or not."""
        return self.decode.bytes_read / self.decode.tokens if self.decode.tokens else 0.0

    @property
    def stall_per_step(self) -> float:
        return self.decode.stall_seconds / len(self.steps) if self.steps else 0.0


def _share(counters: Counters) -> float:
    return counters.hits / counters.lookups if counters.lookups else 0.0


def simulate(
    events: Sequence[LayerEvent],
    *,
    sizes: Sizes,
    slots: int,
    machine: Machine,
    minds: Minds = Minds(),
    report: Report = lambda done, total: None,
) -> Outcome:
    """What an engine with these policies and ``slots`` would do on ``events`` on ``machine``."""
    director = minds.director(sizes, slots, events)
    _require_lookahead(events, director.predictor, minds.predictor)
    _require_what_the_route_reads(events, director.route, minds.route)
    _require_a_processor(machine, director.resolver, minds.resolver)
    run = Simulation(director, sizes, machine)
    for done, event in enumerate(events):
        run.event(event)
        if done % _REPORT_EVERY == 0:
            report(done, len(events))
    outcome = run.finish()
    report(len(events), len(events))
    return outcome


def _require_lookahead(events: Sequence[LayerEvent], predictor: Predictor, name: str) -> None:
    """A predictor must not look worse than it is because the trace is silent."""
    asked = predictor.lookahead
    if not asked:
        return
    depth = max((max(e.lookahead) - e.layer for e in events if e.lookahead), default=0)
    if depth == 0:
        raise UnderstudyError(
            f"{name} reads what later routers say, and this trace has no look-ahead; record one "
            "with look-ahead, or take last-token or popularity"
        )
    if depth < asked:
        raise UnderstudyError(
            f"{name} asks {asked} layers ahead and this trace looks {depth} ahead; "
            f"try --depth {depth}"
        )


def _require_what_the_route_reads(
    events: Sequence[LayerEvent], route: RouteTransform, name: str
) -> None:
    decoded = [event for event in events if event.phase is Phase.DECODE and event.ids]
    if route.wants_scores and any(event.scores is None for event in decoded):
        raise UnderstudyError(
            f"route {name} reads the router's scores, and this trace has none; record one with "
            "scores, or simulate as-routed"
        )
    if route.wants_foretold and decoded and all(event.foretold is None for event in decoded):
        raise UnderstudyError(
            f"route {name} reads what was foretold of a layer, and this trace says nothing; record "
            "one under that route, or simulate as-routed"
        )


def _require_a_processor(machine: Machine, resolver: MissResolver, name: str) -> None:
    if resolver.needs_device and not machine.host:
        raise UnderstudyError(
            f"resolver {name} computes misses in host memory, and nothing is said of how fast; "
            "try --host 40GB/s"
        )


_copied = attrgetter(*(f.name for f in fields(LayerEvent)))
_LOOKAHEAD = [f.name for f in fields(LayerEvent)].index("lookahead")
_COSTS = [f.name for f in fields(LayerEvent)].index("costs")


class Simulation:
    """One run, event by event. ``finish`` ends it."""

    def __init__(self, director: Director, sizes: Sizes, machine: Machine) -> None:
        self.director, self.sizes, self.machine = director, sizes, machine
        self.link = Link(
            machine,
            director.book,
            nbytes=sizes.of,
            place=director.place,
            forget=director.forget,
            wanted=director.wanted,
        )
        self.outcome = Outcome(len(director.book.slots))
        self._hands = Counters()  # what the runtime counts, not the director
        silent = isinstance(director.predictor, NoPrediction) and not director.resolver.needs_device
        self._plain = silent and not director.route.wants_foretold
        self._costs = Costs()
        self._forward: tuple[int, Phase] | None = None  # step and phase of the one under way
        self._layer = -1
        self._started = 0.0
        self._before = Counters()
        self._prompt = 0.0
        self._one = [machine.compute_seconds(1, n, 1) for n in sizes.nbytes]

    # --------------------------------------------------------------------------- around a forward

    def event(self, event: LayerEvent) -> None:
        """One layer of one forward: the frame, then its experts."""
        if event.layer <= self._layer or self._forward != (event.step, event.phase):
            self._end()
            self._begin(event)
        self._layer = event.layer
        link = self.link
        link.advance(link.now + self.machine.frame)
        if event.ids:
            self._experts(event)

    def finish(self) -> Outcome:
        """The last forward ends; nobody may hold a pin any more."""
        self._end()
        self._end_prompt()
        self.outcome.counters = self._total()
        self.director.book.check_integrity(idle=True)
        return self.outcome

    def _begin(self, event: LayerEvent) -> None:
        self._forward = event.step, event.phase
        self._started = self.link.now
        if event.phase is Phase.DECODE:
            self._before = self._total()

    def _end(self) -> None:
        if self._forward is None:
            return
        seconds = self.link.now - self._started
        self._hands.steps += 1
        if self._forward[1] is Phase.PREFILL:
            self._prompt += seconds
        else:
            self._end_prompt()
            self._add_step(seconds)
            self.director.switch.record(seconds)
        self._forward, self._layer = None, -1

    def _add_step(self, seconds: float) -> None:
        outcome = self.outcome
        outcome.steps.append(seconds)
        new = self._total() - self._before
        outcome.decode = new - (Counters() - outcome.decode)
        outcome.decode_compute += seconds - new.stall_seconds

    def _end_prompt(self) -> None:
        """Chunks of one prompt are one prompt."""
        if self._prompt:
            self.outcome.prompts.append(self._prompt)
            self._prompt = 0.0

    def _total(self) -> Counters:
        total = self.director.counters.copy()
        hands = self._hands
        total.prefetch_cancelled = self.link.cancelled
        for name in ("substituted", "skipped", "substituted_mass", "skipped_mass"):
            setattr(total, name, getattr(hands, name))
        total.stall_seconds, total.expert_seconds = hands.stall_seconds, hands.expert_seconds
        total.steps, total.tokens = hands.steps, hands.tokens
        return total

    # ----------------------------------------------------------------------------------- one event

    def _experts(self, event: LayerEvent) -> None:
        started, stalled = self.link.now, self._hands.stall_seconds
        if event.layer == 0:
            self._costs = self.link.costs
            self._hands.tokens += len(event.ids)
        seen = self._as_seen(event)
        plan = self.director.decide(seen)
        if plan.event is not seen:
            self._hands.count_changes(seen, plan.event)
        if plan.skipped:
            self._hands.count_left_out(plan.event, plan.skipped)
        host_done = self.link.now + self._host_seconds(plan)
        all_here = self.director.ample and len(plan.hits) == len(plan.order)
        if all_here and not self.director.route.wants_foretold:
            self.link.advance(self.link.now + self._seconds(plan, plan.order))
        elif not self._plain or not self._at_once(plan):
            _Errand(self, plan, event).carry_out()
        self._wait_for_the_host(host_done)
        stall = self._hands.stall_seconds - stalled
        self._hands.expert_seconds += self.link.now - started - stall

    def _as_seen(self, event: LayerEvent) -> LayerEvent:
        """The recorded event, as a mind sees it before its loads start: costs of this run, and no
        look-ahead yet."""
        values = list(_copied(event))
        values[_LOOKAHEAD], values[_COSTS] = {}, self._costs
        return LayerEvent(*values)

    def _seconds(self, plan: LayerPlan, experts: Sequence[ExpertId]) -> float:
        """What computing these together takes."""
        layer = plan.event.layer
        if len(plan.event.ids) == 1:
            return len(experts) * self._one[layer]
        tokens = plan.event.needed()
        pairs = sum(tokens[e.expert] for e in experts)
        return self.machine.compute_seconds(len(experts), self.sizes.nbytes[layer], pairs)

    def _host_seconds(self, plan: LayerPlan) -> float:
        """What the processor takes for its experts, from the moment the event was looked up."""
        if not plan.in_place:
            return 0.0
        tokens, size = plan.event.needed(), self.sizes.nbytes[plan.event.layer]
        pairs = sum(tokens[e.expert] for e in plan.in_place)
        return self.machine.host_seconds(len(plan.in_place), size, pairs)

    def _wait_for_the_host(self, until: float) -> None:
        if until > self.link.now:
            self._hands.stall_seconds += until - self.link.now
            self.link.advance(until)

    def _at_once(self, plan: LayerPlan) -> bool:
        """Carry out a plan of which nothing can overlap with speculation, without the queue: the
        same clock, several times sooner. False: it cannot be done, and nothing was done."""
        director, event = self.director, plan.event
        own = set(plan.order) if plan.loads else ()
        if plan.late or any(load.victim in own for load in plan.loads):
            return False
        director.foresee(event)
        now = self.link.now
        if plan.hits:
            now += self._seconds(plan, plan.hits)
        if plan.loads:
            now = self._land_in_turn(plan, now)
        self.link.now = now
        return True

    def _land_in_turn(self, plan: LayerPlan, now: float) -> float:
        """Loads arrive one after the other from `link.now` on, and are computed as they land."""
        size = self.sizes.nbytes[plan.event.layer]
        each, count = self.machine.load_seconds(size), len(plan.loads)
        for load in plan.loads:
            self.director.bring(load)
        waiting = [load.expert for load in _as_they_lie(plan)]
        single = len(plan.event.ids) == 1
        landing, stall, first = self.link.now + each, 0.0, 0
        while first < count:
            if landing > now:
                stall += landing - now
                now = landing
            last = first + 1
            landing += each
            while last < count and landing <= now:
                last += 1
                landing += each
            ready = waiting[first:last]
            now += (
                len(ready) * self._one[plan.event.layer] if single else self._seconds(plan, ready)
            )
            first = last
        self._hands.stall_seconds += stall
        self.link.carried(count * size, count * each)
        return now


def _as_they_lie(plan: LayerPlan) -> Sequence[Load]:
    """A prompt reads the experts of a layer in the order of the file, which is their own."""
    if plan.event.phase is Phase.PREFILL:
        return sorted(plan.loads, key=lambda load: load.expert)
    return plan.loads


class _Errand:
    """One plan being carried out, step by step as the runtime's errand does it.

    ``waiting``: loads whose victims cannot leave yet; ``todo``: experts not computed yet;
    ``pinned``: experts that must stay until they are. ``recorded``: the event of the trace, with
    its look-ahead.
    """

    def __init__(self, run: Simulation, plan: LayerPlan, recorded: LayerEvent) -> None:
        self.run, self.plan, self.recorded = run, plan, recorded
        self.director, self.link, self.book = run.director, run.link, run.director.book
        self.todo, self.waiting = list(plan.order), list(plan.loads)
        self.pinned: set[ExpertId] = set()
        for expert in (*plan.hits, *plan.late):
            self._pin(expert)
        for expert in plan.late:
            self.link.promote(expert)
        self.offered = False
        self._start_loads()
        if self.waiting:
            self.link.speculate(())

    def carry_out(self) -> None:
        asked, loading = False, bool(self.plan.loads or self.plan.late)
        while self.todo:
            ready = self._take_ready()
            if not asked and (not ready or not loading):
                asked = True
                self._look_ahead()
            if not ready:
                ready = self._next_ready()
            self.link.advance(self.link.now + self.run._seconds(self.plan, ready))
            for expert in ready:
                self.pinned.discard(expert)
                self.book.unpin(expert)
        if not asked:
            self._look_ahead()

    def _take_ready(self) -> list[ExpertId]:
        if self.waiting:
            self._start_loads()
        ready: list[ExpertId] = []
        later: list[ExpertId] = []
        for expert in self.todo:
            there = expert in self.pinned and self.book.state(expert) is State.READY
            (ready if there else later).append(expert)
        self.todo = later
        return ready

    def _next_ready(self) -> list[ExpertId]:
        while True:
            ready = self._take_ready()
            if ready:
                return ready
            started = self.link.now
            self.link.wait()
            self.run._hands.stall_seconds += self.link.now - started

    def _look_ahead(self) -> None:
        director, event = self.director, self.plan.event
        depth = director.predictor.lookahead if director.switch.on else 0
        foretell = director.route.wants_foretold and event.phase is Phase.DECODE
        if depth or foretell:
            self.link.advance(self.link.now + self.run.machine.lookahead)
            event.lookahead = {
                layer: said
                for layer, said in self.recorded.lookahead.items()
                if layer - event.layer <= max(1, depth)
            }
        self.guesses = director.foresee(event)
        self.offered = True
        if not self.waiting:
            self._offer()

    def _offer(self) -> None:
        if self.offered:
            self.offered = False
            self.link.speculate(self.guesses)

    def _start_loads(self) -> None:
        later: list[Load] = []
        started: list[ExpertId] = []
        for load in self.waiting:
            if self.director.may_start(load):
                self.director.commit(load)
                self._pin(load.expert)
                started.append(load.expert)
            else:
                later.append(load)
        if self.plan.event.phase is Phase.PREFILL:
            started.sort()
        if started:
            self.link.demand_all(started)
        self.waiting = later
        if not later:
            self._offer()

    def _pin(self, expert: ExpertId) -> None:
        self.book.pin(expert)
        self.pinned.add(expert)
