"""Who is on the front, and how a time is made of ratios."""

from __future__ import annotations

from dataclasses import replace

import pytest

from understudy.compare import COLUMNS, Entry, Quality, Speed, cells, front, tpot


def entry(name: str, ratio: float, lost: float, baseline: float = 1.0) -> Entry:
    times = tuple(ratio * baseline * x for x in (1, 2, 3))
    speed = Speed(times, tuple(baseline * x for x in (1, 2, 3)), 0, 0, 0, 0)
    return Entry(name, lost == 0, speed, Quality(lost, lost, lost, 0, 1, 0, 0, 0, True))


def test_the_front_is_whom_nobody_beats() -> None:
    entries = [
        entry("exact", 1.0, 0.0),
        entry("slow and exact", 1.1, 0.0),
        entry("fast and lossy", 0.5, 0.2),
        entry("slower and more lossy", 0.6, 0.3),
        entry("between", 0.8, 0.1),
        entry("lucky", 0.9, -0.01),  # counts as nothing lost, and beats whoever is exact
        Entry("not run", True, why="no profile"),
    ]
    assert front(entries) == {"fast and lossy", "between", "lucky"}


def test_equals_stand_beside_each_other_on_the_front() -> None:
    assert front([entry("a", 1.0, 0.0), entry("b", 1.0, 0.0)]) == {"a", "b"}


def test_a_time_is_a_ratio_times_the_median_of_all_baselines() -> None:
    """The second was timed while the machine was twice as slow; the ratio does not know."""
    found = tpot([entry("a", 0.5, 0, baseline=1.0), entry("b", 0.5, 0, baseline=2.0)])
    assert found["a"] == found["b"] == pytest.approx(0.5 * 2.5)  # of 1 2 3 2 4 6


def test_rounding_otherwise_is_neither_exact_nor_lossy_nor_a_broken_promise() -> None:
    e = entry("cpu-split", 0.5, 0.0)
    rounded = replace(e, exact=False, equivalent=True, quality=replace(e.quality, identical=False))
    assert not rounded.broken
    (row,) = cells([rounded])
    assert row[COLUMNS.index("class")] == "equivalent"
