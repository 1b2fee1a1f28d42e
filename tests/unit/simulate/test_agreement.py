"""Engine and simulator agree exactly: the real `Runtime`, on a queue that keeps virtual time.

What is the engine's own here: the runtime with its errands, the director, every policy. What is
not: disks, threads, expert weights. Both sides share the virtual `Link`, so they can differ only in
what they ask of it, in which order, and when.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from unit.policies.traces import at_random

from understudy.core import Counters, ExpertId, Forward, LayerEvent, Phase, current_forward
from understudy.experts import runtime as hands
from understudy.policies.residency import Slot
from understudy.registry import EVICTORS
from understudy.simulate import Link, Machine, Minds, Sizes, simulate

LAYERS, EXPERTS, K = 4, 10, 3
SIZES = Sizes((EXPERTS,) * LAYERS, (5 << 20, 4 << 20, 5 << 20, 3 << 20))
# A load takes about as long as the experts of a layer: now the one is waited for, now the other.
MACHINE = Machine(link=2e9, compute=6e9, latency=1e-4, per_token=2e-4, frame=1.3e-3, lookahead=1e-4)
SECONDS = ("stall_seconds", "expert_seconds")


class Queue:
    """What a `TransferQueue` is to the runtime, on the virtual link. Nothing is read."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.stalled = 0.0

    def tend(self) -> None:
        """The link lands by its own clock."""

    def demand_all(
        self, loads: Sequence[tuple[ExpertId, Slot]], *, as_they_lie: bool = False
    ) -> None:
        experts = [expert for expert, _ in loads]
        self.link.demand_all(sorted(experts) if as_they_lie else experts)

    def wait(self, timeout: float | None = None) -> bool:
        self.link.wait()
        return True

    @property
    def meter(self) -> Any:
        costs = self.link.costs
        return SimpleNamespace(bandwidth=costs.link_bandwidth, idle=costs.link_idle)

    def take_error(self, expert: ExpertId) -> None:
        return None

    def require_open(self) -> None:
        return None

    def __getattr__(self, name: str) -> Any:
        """promote, speculate, cancelled, queued: the link's own."""
        return getattr(self.link, name)


class Computing:
    """Takes the place of whoever computes: experts take their time and give zeros."""

    far = False

    def __init__(self, link: Link) -> None:
        self.link = link

    def begin(
        self, layer: int, x: torch.Tensor, ids: Sequence[Sequence[int]], weights: Any, *, keep: bool
    ) -> Computing:
        self.layer, self.x = layer, x
        self.needed = LayerEvent(0, 0, Phase.DECODE, ids).needed()
        return self

    def __contains__(self, expert: int) -> bool:
        return False  # nobody has to be left out: all give zeros

    def skip(self, expert: int) -> None:
        pass

    def run(self, ready: Sequence[tuple[ExpertId, int]]) -> None:
        tokens = sum(self.needed[expert.expert] for expert, _ in ready)
        seconds = MACHINE.compute_seconds(len(ready), SIZES.nbytes[self.layer], tokens)
        self.link.advance(self.link.now + seconds)

    def sum(self) -> torch.Tensor:
        return torch.zeros_like(self.x)


class Asking:
    """What later routers said when the trace was recorded."""

    def __init__(self, link: Link) -> None:
        self.link = link
        self.event: LayerEvent | None = None

    def ask(self, forward: Any, event: LayerEvent, depth: int, rows: Any, started: Any) -> Any:
        assert self.event is not None and self.event.layer == event.layer
        self.link.advance(self.link.now + MACHINE.lookahead)
        said = self.event.lookahead.items()
        return {layer: told for layer, told in said if layer - event.layer <= depth}

    def scores(self, forward: Any, layer: int, rows: Any) -> Any:
        assert self.event is not None
        return self.event.scores


def by_engine(events: Sequence[LayerEvent], slots: int, minds: Minds, monkeypatch: Any) -> Counters:
    """The events through the real runtime."""
    director = minds.director(SIZES, slots, events)
    link = Link(
        MACHINE, director.book, nbytes=SIZES.of, place=director.place,
        forget=director.forget, wanted=director.wanted,
    )  # fmt: skip
    monkeypatch.setattr(hands, "time", SimpleNamespace(perf_counter=lambda: link.now))
    asking = Asking(link)
    runtime = hands.Runtime(
        director=director,
        compute=_any(Computing(link)),
        transfer=_any(Queue(link)),
        lock=threading.RLock(),
        lookahead=_any(asking),
    )
    for forward, layers in forwards(events):
        runtime.begin(forward)
        token = current_forward.set(forward)
        for event in layers:
            link.advance(link.now + MACHINE.frame)
            asking.event = event
            ids = torch.tensor(event.ids)
            weights = torch.tensor(event.weights) if event.weights else torch.ones(ids.shape)
            runtime(event.layer, torch.zeros(len(ids), 1), ids, weights)
        current_forward.reset(token)
        runtime.end(forward)
    director.book.check_integrity(idle=True)
    return runtime.counters


def forwards(events: Sequence[LayerEvent]) -> Iterator[tuple[Forward, Sequence[LayerEvent]]]:
    for start in range(0, len(events), LAYERS):
        layers = events[start : start + LAYERS]
        yield Forward(layers[0].step, layers[0].phase), layers


def _any(thing: object) -> Any:
    return thing


# --------------------------------------------------------------------------------------- the trace


def prompt(seed: int, step: int, tokens: int) -> list[LayerEvent]:
    """One forward of several tokens."""
    rows = at_random(seed, steps=tokens, layers=LAYERS, experts=EXPERTS, k=K)
    return [
        LayerEvent(
            step, layer, Phase.PREFILL, ids=[rows[t * LAYERS + layer].ids[0] for t in range(tokens)]
        )
        for layer in range(LAYERS)
    ]


def told(events: Sequence[LayerEvent], depth: int, seed: int) -> list[LayerEvent]:
    """The same with look-ahead: right in three of four ranks, within a forward."""
    dice = random.Random(seed)
    out = []
    for i, event in enumerate(events):
        said = {}
        for later in events[i + 1 : i + 1 + min(depth, LAYERS - 1 - event.layer)]:
            ids = [_nearly(row, dice) for row in later.ids]
            said[later.layer] = (ids, [[1.0] * len(row) for row in ids])
        out.append(replace(event, lookahead=said))
    return out


def _nearly(row: Sequence[int], dice: random.Random) -> list[int]:
    """Right in three of four ranks; nobody twice."""
    said = [e for e in row if dice.random() < 0.75]
    others = [e for e in range(EXPERTS) if e not in said]
    return said + dice.sample(others, len(row) - len(said))


def conversation(seed: int) -> list[LayerEvent]:
    """Two prompts, each with an answer; the second long enough for the switch to try both ways."""
    first = at_random(seed, steps=12, layers=LAYERS, experts=EXPERTS, k=K)
    second = at_random(seed + 1, steps=60, layers=LAYERS, experts=EXPERTS, k=K)
    events = [*prompt(seed, 0, 7), *_from_step(first, 1), *prompt(seed + 2, 20, 4)]
    return told([*events, *_from_step(second, 21)], depth=2, seed=seed)


def _from_step(events: Sequence[LayerEvent], start: int) -> list[LayerEvent]:
    return [replace(event, step=event.step + start) for event in events]


TRACE = conversation(3)


def whole(counters: Counters) -> dict[str, int | float]:
    return {k: v for k, v in counters.as_dict().items() if k not in SECONDS}


def compare(
    minds: Minds, slots: int, monkeypatch: Any, trace: Sequence[LayerEvent] = TRACE
) -> tuple[Counters, Counters]:
    engine = by_engine(trace, slots, minds, monkeypatch)
    simulated = simulate(trace, sizes=SIZES, slots=slots, machine=MACHINE, minds=minds).counters
    assert whole(simulated) == whole(engine)
    for name in SECONDS:
        assert getattr(simulated, name) == pytest.approx(getattr(engine, name), rel=1e-9, abs=1e-12)
    return engine, simulated


# ------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("slots", [2, 5, 12, 25, LAYERS * EXPERTS])
@pytest.mark.parametrize("predictor", ["none", "last-token", "popularity", "next-gate"])
@pytest.mark.parametrize("evictor", EVICTORS.builtin_names)
def test_engine_and_simulator_agree(
    evictor: str, predictor: str, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(Minds(evictor, predictor), slots, monkeypatch)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("slots", [5, 12, 25])
def test_with_speculation_always_on_and_further_ahead(
    depth: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    minds = Minds("lrfu", "next-gate", depth=depth, self_switch=False)
    engine, _ = compare(minds, slots, monkeypatch)
    assert engine.prefetch_used > 0 and engine.late > 0 and engine.prefetch_wasted > 0


# Lossy ones on traces that carry what they ask for.


def foretold(events: Sequence[LayerEvent]) -> list[LayerEvent]:
    """With weights and scores, and with what each layer foresaw as what its next was foretold."""
    dice = random.Random(9)
    out: list[LayerEvent] = []
    for event in events:
        scores = [[dice.random() for _ in range(EXPERTS)] for _ in event.ids]
        told = out[-1].lookahead.get(event.layer) if out and event.layer else None
        decode = event.phase is Phase.DECODE and told is not None
        weights = [[dice.randrange(1, 16) / 16 for _ in row] for row in event.ids]
        out.append(
            replace(event, weights=weights, scores=scores, foretold=told if decode else None)
        )
    return out


LOSSY = (
    "speculated",
    "verified:below=0.5",
    "verified:below=0",
    "buddy:stand_in=random:percentile=0:beta=1.1",
    "buddy:stand_in=drop:percentile=0:beta=1.1:rho=1",
    "buddy:stand_in=drop:percentile=0:rho=0",
)


@pytest.mark.parametrize("slots", [5, 12, 25, LAYERS * EXPERTS])
@pytest.mark.parametrize("route", LOSSY)
def test_they_agree_about_lossy_routes_on_traces_recorded_under_them(
    route: str, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = "none" if route.startswith("buddy") else "next-gate"
    minds = Minds("lrfu", predictor, route=route)
    engine, simulated = compare(minds, slots, monkeypatch, foretold(TRACE))
    acts = engine.substituted + engine.skipped
    assert bool(acts) is not route.endswith("=0")
    assert engine.substituted_mass == pytest.approx(simulated.substituted_mass)


def test_the_comparison_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = by_engine(TRACE, 12, Minds("lrfu", "next-gate", self_switch=False), monkeypatch)
    faster = replace(MACHINE, link=4e9)
    other = simulate(
        TRACE, sizes=SIZES, slots=12, machine=faster,
        minds=Minds("lrfu", "next-gate", self_switch=False),
    ).counters  # fmt: skip
    assert whole(other) != whole(engine)
