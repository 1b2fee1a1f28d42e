"""Summaries against a hand-known trace and against slow, obvious counting."""

from __future__ import annotations

import random
from math import log

import pytest

from understudy.core import LayerEvent, Phase
from understudy.summary import overall, summarise
from understudy.trace import Shape, Trace


def trace(texts: list[list[list[int]]], experts: int) -> Trace:
    """One layer; each text's first two tokens are its prompt."""
    found = Trace(Shape("toy", (experts,), len(texts[0][0]), (1,)))
    for number, rows in enumerate(texts):
        for step, ids in enumerate([rows[:2], *([row] for row in rows[2:])]):
            phase = Phase.DECODE if step else Phase.PREFILL
            found.events.append(LayerEvent(step, 0, phase, ids))
            found.sequences.append(number)
    return found


def test_a_small_trace_by_hand() -> None:
    one = summarise(trace([[[0, 1], [1, 2], [0, 1]], [[3, 0], [3, 0]]], 8))[0]
    assert (one.tokens, one.used) == (5, 4 / 8)
    # Pairs: {0,1}-{1,2}: 1 of 2; {1,2}-{0,1}: 1 of 2; {3,0}-{3,0}: 2 of 2.
    assert one.overlap == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert one.overlap_uniform == pytest.approx(2 / 8)
    uses = [4, 3, 1, 2]  # of experts 0, 1, 2, 3
    assert one.entropy == pytest.approx(-sum(n / 10 * log(n / 10) for n in uses))
    # Repeats: 1 after 1 token; 0 after 2; 1 after 1; 3 and 0 after 1 each.
    assert one.gap == (1.0, 2.0)
    # 1: itself and nobody since it... seen: 0 1 | 1: {1}; 2; 0: {0, 1, 2}; 1: {1, 2, 0}; 3, 0: two.
    assert one.stack == (2.0, 3.0)
    # Partners are few: everybody's top four are all of them.
    assert (one.partners, one.partners_uniform) == (1.0, pytest.approx(4 / 7))


def slow_distances(texts: list[list[list[int]]]) -> tuple[list[int], list[int]]:
    gaps, stacks = [], []
    for rows in texts:
        uses = [(number, e) for number, row in enumerate(rows) for e in row]
        for place, (number, expert) in enumerate(uses):
            before = [i for i in range(place) if uses[i][1] == expert]
            if before:
                gaps.append(number - uses[before[-1]][0])
                stacks.append(len({e for _, e in uses[before[-1] : place]}))
    return gaps, stacks


@pytest.mark.parametrize("seed", range(10))
def test_distances_equal_slow_counting(seed: int) -> None:
    rng = random.Random(seed)
    texts = [[rng.sample(range(9), 3) for _ in range(30)] for _ in range(3)]
    one = summarise(trace(texts, 9))[0]
    gaps, stacks = map(sorted, slow_distances(texts))
    for spread, values in ((one.gap, gaps), (one.stack, stacks)):
        middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
        assert spread == (middle, values[len(values) * 9 // 10])


def test_chance_is_what_chance_gives() -> None:
    rng = random.Random(0)
    texts = [[rng.sample(range(16), 4) for _ in range(4000)]]
    one = summarise(trace(texts, 16))[0]
    assert one.overlap == pytest.approx(one.overlap_uniform, abs=0.01)
    assert one.partners == pytest.approx(one.partners_uniform, abs=0.03)
    assert one.entropy_share == pytest.approx(1, abs=0.01)
    assert overall([one])["used"] == 1.0
