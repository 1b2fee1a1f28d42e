"""Replaying traces whose answers are known by hand."""

from __future__ import annotations

import pytest
from unit.policies.traces import at_random, event, singles, sweeps

from understudy.core import Counters, LayerEvent, Phase, UnknownName
from understudy.simulate import replay


def test_a_trace_that_fits_misses_everybody_once() -> None:
    counted = replay(sweeps(5, [(0, 1), (2, 3)]), slots=4, layers=2)
    assert (counted.events, counted.misses, counted.hits, counted.evictions) == (10, 4, 16, 0)


def test_an_event_is_looked_up_as_a_whole() -> None:
    # One by one, 2 would push 0 out just before 0 is looked up: four misses instead of three.
    trace = [event(0, 0, 1), event(0, 2, 0)]
    counted = replay(trace, slots=2, layers=1, evictor="lru-global")
    assert (counted.hits, counted.misses) == (1, 3)


def test_a_prompt_larger_than_the_slots_leaves_its_end() -> None:
    prompt = LayerEvent(0, 0, Phase.PREFILL, ids=[[e] for e in range(8)])
    counted = replay([prompt, event(0, 6), event(0, 7), event(0, 0)], slots=2, layers=1)
    assert (counted.misses, counted.hits) == (8 + 1, 2)


def test_bytes_are_those_of_each_expert() -> None:
    trace = [event(0, 0), event(1, 0), event(0, 0)]
    counted = replay(trace, slots=2, layers=2, nbytes=lambda e: 1000 * (e.layer + 1))
    assert counted.demand_bytes == counted.bytes_read == 3000


def test_counting_can_start_late_but_the_cache_does_not() -> None:
    trace = singles([0, 1, 2, 0, 1, 3])
    counted = replay(trace, slots=3, layers=1, from_event=3)
    assert (counted.events, counted.hits, counted.misses) == (3, 2, 1)
    assert replay(trace, slots=3, layers=1, from_event=len(trace)) == Counters()


def test_belady_sees_what_comes_after_the_start_of_counting() -> None:
    trace = singles([0, 1, 2, 1, 2, 1, 2])
    counted = replay(trace, slots=2, layers=1, evictor="belady", from_event=3)
    assert counted.misses == 0


@pytest.mark.parametrize("evictor", ["lru", "lfu", "belady"])
def test_the_same_trace_gives_the_same_answer(evictor: str) -> None:
    trace = at_random(1, steps=20, layers=2, experts=6, k=2)
    first, second = (replay(trace, slots=5, layers=2, evictor=evictor) for _ in range(2))
    assert first == second


def test_a_mistyped_evictor_is_named() -> None:
    with pytest.raises(UnknownName, match="did you mean 'lru'"):
        replay(singles([0]), slots=1, layers=1, evictor="lruu")
