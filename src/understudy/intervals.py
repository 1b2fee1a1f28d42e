"""Means with 95 % intervals, by a paired bootstrap over prompt sets and the blocks inside them.

Knows: numbers, and which of them belong together. Does not know: what they measure, tokens, models.

Neighbouring tokens are not independent, and neither are texts of one set: what is drawn again and
again is therefore, in two stages,

    1. prompt sets, with replacement, as many as there are;
    2. inside each drawn set, and inside each of its texts, blocks of `BLOCK` neighbouring tokens,
       with replacement, as many as the text has. Texts of one set keep their shares.

Paired: the numbers are differences on the same tokens, and the same seed draws the same blocks for
every policy that is scored on the same texts. The bounds are the 2.5 and 97.5 % quantiles of the
resampled means. Problems with one right answer are drawn one by one inside each kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK = 32
DRAWS = 2000

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Figure:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


def over_sets(sets: Sequence[Sequence[Numbers]], seed: int = 0) -> Figure:
    """``sets``: for each prompt set its texts, for each text one number per token."""
    return over_blocks([[_blocks(text) for text in texts] for texts in sets], seed)


def over_blocks(sets: Sequence[Sequence[tuple[Numbers, Numbers]]], seed: int = 0) -> Figure:
    """The same of (sum, length) of each block of each text."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(sets), (DRAWS, len(sets)))
    sums, counts = np.zeros(DRAWS), np.zeros(DRAWS)
    for number, texts in enumerate(sets):
        draws = np.nonzero(chosen == number)[0]  # which draws have this set, once per time
        for sum_of, size_of in texts:
            blocks = rng.integers(0, len(sum_of), (len(draws), len(sum_of)))
            np.add.at(sums, draws, sum_of[blocks].sum(1))
            np.add.at(counts, draws, size_of[blocks].sum(1))
    texts_of_all = [text for texts in sets for text in texts]
    mean = sum(s.sum() for s, _ in texts_of_all) / sum(n.sum() for _, n in texts_of_all)
    return _figure(float(mean), sums / counts)


def over_problems(kinds: Sequence[Numbers], seed: int = 0) -> Figure:
    """``kinds``: for each kind of problem one number per problem; kinds keep their shares."""
    rng = np.random.default_rng(seed)
    sums = np.zeros(DRAWS)
    for values in kinds:
        drawn = rng.integers(0, len(values), (DRAWS, len(values)))
        sums += values[drawn].sum(1)
    everything = np.concatenate(kinds)
    return _figure(float(everything.mean()), sums / len(everything))


def block_sums(values: Numbers) -> list[float]:
    """What the second stage draws from; enough to compute the interval again."""
    return [float(x) for x in _blocks(values)[0]]


def sizes(tokens: int) -> Numbers:
    """Lengths of the blocks of so many tokens."""
    starts = np.arange(0, tokens, BLOCK)
    return np.diff([*starts, tokens]).astype(np.float64)


def _blocks(values: Numbers) -> tuple[Numbers, Numbers]:
    """Sum and length of each block; the last one may be shorter."""
    return np.add.reduceat(values, np.arange(0, len(values), BLOCK)), sizes(len(values))


def _figure(mean: float, resampled: Numbers) -> Figure:
    low, high = np.quantile(resampled, [0.025, 0.975])
    return Figure(mean, float(low), float(high))
