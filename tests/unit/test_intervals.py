"""Intervals beside figures known by hand, and beside the same bootstrap written plainly."""

from __future__ import annotations

import math

import numpy as np
import pytest

from understudy import intervals
from understudy.intervals import BLOCK, Figure, Numbers, over_problems, over_sets


def drawn_plainly(sets: list[list[Numbers]], draws: int = 4000) -> Figure:
    """Slow and obvious: sets, then blocks of each text of each drawn set."""
    dice = np.random.default_rng(99)
    means = []
    for _ in range(draws):
        values: list[Numbers] = []
        for chosen in dice.integers(0, len(sets), len(sets)):
            for text in sets[chosen]:
                blocks = [text[i : i + BLOCK] for i in range(0, len(text), BLOCK)]
                values += [blocks[b] for b in dice.integers(0, len(blocks), len(blocks))]
        means.append(np.concatenate(values).mean())
    low, high = np.quantile(means, [0.025, 0.975])
    everything = np.concatenate([text for texts in sets for text in texts])
    return Figure(everything.mean(), float(low), float(high))


def test_the_same_everywhere_leaves_no_doubt() -> None:
    found = over_sets([[np.full(40, 0.25), np.full(64, 0.25)] for _ in range(5)])
    assert found == Figure(0.25, 0.25, 0.25)


def test_two_sets_that_differ() -> None:
    # Means of two draws from {0, 1}: 0 with 1/4, 1/2 with 1/2, 1 with 1/4.
    found = over_sets([[np.zeros(64)], [np.ones(64)]])
    assert found == Figure(0.5, 0.0, 1.0)


def test_longer_texts_weigh_more() -> None:
    found = over_sets([[np.zeros(96), np.ones(32)]])
    assert found == Figure(0.25, 0.25, 0.25)  # one set, each text one value: nothing can change


def test_blocks_inside_sets_are_drawn_too() -> None:
    half = np.concatenate([np.zeros(BLOCK), np.ones(BLOCK)])
    found = over_sets([[half], [half]])
    assert found.mean == 0.5
    assert found.low < 0.25 < 0.75 < found.high


@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_as_drawn_plainly(spread: float) -> None:
    dice = np.random.default_rng(5)
    sets = [
        [dice.normal(centre, 1.0, length) for length in (128, 75)]
        for centre in dice.normal(0, spread, 6)
    ]
    fast, slow = over_sets(sets), drawn_plainly(sets)
    width = slow.high - slow.low
    assert math.isclose(fast.mean, slow.mean)
    assert abs(fast.low - slow.low) < 0.1 * width
    assert abs(fast.high - slow.high) < 0.1 * width


def test_the_same_seed_gives_the_same_interval() -> None:
    sets = [[np.random.default_rng(s).normal(size=100)] for s in range(5)]
    assert over_sets(sets, seed=3) == over_sets(sets, seed=3)
    assert over_sets(sets, seed=3) != over_sets(sets, seed=4)


def test_problems_are_drawn_inside_their_kind() -> None:
    # One kind always lost, one never: drawn across kinds, the mean would vary.
    assert over_problems([np.full(10, -1.0), np.zeros(10)]) == Figure(-0.5, -0.5, -0.5)
    found = over_problems([np.array([-1.0, 0, 0, 0])])
    assert found.mean == -0.25
    assert (found.low, found.high) == (-0.75, 0.0)


def test_block_sums_add_up() -> None:
    values = np.arange(70.0)
    assert intervals.block_sums(values) == [
        sum(range(32)), sum(range(32, 64)), sum(range(64, 70))
    ]  # fmt: skip
