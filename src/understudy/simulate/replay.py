"""Counts what an evictor does on a trace: loads take no time, nobody speculates.

Knows: events, the director, the residency book. Does not know: files, tensors, models, any clock.
It answers one question: what would this evictor have missed with this many slots?
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from understudy.core import Counters, ExpertId, LayerEvent
from understudy.policies import Evictor
from understudy.policies.director import Director
from understudy.policies.predict import NoPrediction, SelfSwitch
from understudy.policies.residency import Residency
from understudy.policies.resolve import Fetch
from understudy.policies.route import AsRouted
from understudy.registry import EVICTORS, ORACLES


def replay(
    events: Sequence[LayerEvent],
    *,
    slots: int,
    layers: int,
    evictor: str = "lru",
    nbytes: Callable[[ExpertId], int] = lambda expert: 1,
    from_event: int = 0,
) -> Counters:
    """What ``evictor`` does on ``events`` with ``slots`` slots, counted from ``from_event`` on.

    ``belady`` sees all of ``events`` beforehand.
    """
    book = Residency(slots)
    director = Director(
        book,
        evictor=evictor_named(evictor, events, slots, layers),
        predictor=NoPrediction(layers=layers, experts=()),
        resolver=Fetch(),
        route=AsRouted(),
        switch=SelfSwitch(enabled=False),
        nbytes=nbytes,
    )
    for event in events[:from_event]:
        _carry_out(director, event)
    before = director.counters.copy()
    for event in events[from_event:]:
        _carry_out(director, event)
    book.check_integrity(idle=True)
    return director.counters - before


def evictor_named(name: str, events: Sequence[LayerEvent], slots: int, layers: int) -> Evictor:
    """The evictor; an oracle is shown ``events``."""
    future = {"future": events} if name in ORACLES else {}
    found: Evictor = EVICTORS.get(name)(slots=slots, layers=layers, **future)
    return found


def _carry_out(director: Director, event: LayerEvent) -> None:
    """The runtime's order of things: a load starts when its victim has been computed."""
    plan = director.decide(event)
    for load in plan.loads:
        director.bring(load)
    director.foresee(plan.event)
