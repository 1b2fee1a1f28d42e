"""Tiles: the fastest of each kernel, measured once per device and shape, written down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

if find_spec("triton") is None:  # not imported yet: the next line says how
    pytest.skip("triton is not installed", allow_module_level=True)

from tests import interpreted  # noqa: F401  before the kernels
from tests.unit.experts.device.reference import BF16, FP32, Experts, Here
from understudy import native
from understudy.experts.device import tuning
from understudy.experts.device.swiglu import Swiglu, Tiles


class Clock(Here):
    """Streams, events and graphs as far as a measurement asks; a launch takes a second."""

    now = 0.0

    @property
    def compute(self) -> Clock:
        return self

    def launch(self, *args: Any, **options: Any) -> None:
        self.now += 1
        super().launch(*args, **options)

    def record(self, *, timed: bool = False) -> Event:
        assert timed
        return Event(self.now)

    def graph(self) -> Graph:
        return Graph(self)


class Event:
    def __init__(self, at: float) -> None:
        self.at = at

    def synchronize(self) -> None:
        pass

    def seconds_since(self, earlier: Event) -> float:
        return self.at - earlier.at


class Graph:
    """Counts what it records, and repeats the count only."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def begin(self) -> None:
        self.began = self.clock.now

    def end(self) -> None:
        self.recorded = self.clock.now - self.began

    def replay(self) -> None:
        self.clock.now += self.recorded


def trial(dtype: torch.dtype = BF16, **how: Any) -> tuning.Trial:
    some = Experts(16, 8, dtype=dtype, device=Clock(), count=4)
    given = tuning.Trial(
        some.device, some.slab, some.format, dtype, some.arena, some.slot_bytes, ranks=2
    )
    return replace(given, **how)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Callable[..., None]:
    """``times(f)``: what is measured is ``f(tiles)`` seconds."""

    def set_times(of: Callable[[Tiles], float]) -> None:
        for name in ("_few", "_many"):
            monkeypatch.setattr(tuning, name, lambda trial, kernel: of(kernel.tiles))

    return set_times


def odd(tiles: Tiles) -> float:
    """Fastest: the third of HIDDEN, the second of DOWN, the last of MANY."""
    best = Tiles(tuning.HIDDEN[2], tuning.DOWN[1], tuning.MANY[-1])
    names = ("hidden", "down", "many")
    return 1e-6 + sum(1e-6 for n in names if getattr(tiles, n) != getattr(best, n))


def test_the_fastest_of_each(times: Callable[..., None]) -> None:
    times(odd)
    found = tuning.choose(trial())
    assert found.tiles == Tiles(tuning.HIDDEN[2], tuning.DOWN[1], tuning.MANY[-1])
    assert found.microseconds == {"few": 2.0, "many": 1.0}  # many was tried last


def test_the_first_measurement_holds(times: Callable[..., None]) -> None:
    times(odd)
    first = tuning.choose(trial())
    times(lambda tiles: pytest.fail("measured twice"))
    assert tuning.choose(trial()) == first


@pytest.mark.parametrize("other", ["ranks", "dtype", "device"])
def test_what_differs_is_measured_for_itself(times: Callable[..., None], other: str) -> None:
    times(odd)
    tuning.choose(trial())
    times(lambda tiles: 1.0)
    another = Clock()
    another.name = "another"
    how: dict[str, Any] = {"ranks": {"ranks": 3}, "device": {"device": another}}.get(other, {})
    found = tuning.choose(trial(FP32 if other == "dtype" else BF16, **how))
    assert found.tiles.hidden == tuning.HIDDEN[0]  # the first of equals


def test_a_damaged_file_is_measured_again(times: Callable[..., None], folder: Path) -> None:
    times(odd)
    first = tuning.choose(trial())
    (file,) = (folder / "kernels").iterdir()
    file.write_text('{"hidden": {"rows": 4')
    assert tuning.choose(trial()) == first


def test_a_tile_too_large_for_the_device_is_left_out(times: Callable[..., None]) -> None:
    import triton

    def too_large(tiles: Tiles) -> float:
        if tiles.hidden == tuning.HIDDEN[2]:
            raise triton.OutOfResources(1, 0, "shared memory")
        return odd(tiles)

    times(too_large)
    assert tuning.choose(trial()).tiles.hidden == tuning.HIDDEN[0]


def test_nothing_is_measured_that_cannot_be_kept(times: Callable[..., None], folder: Path) -> None:
    times(lambda tiles: pytest.fail("measured"))
    (folder / "kernels").write_text("in the way")
    found = tuning.choose(trial())
    assert found.tiles == Tiles.usual(BF16)
    assert "cannot be written" in found.why


def test_a_measurement_reads_other_experts_in_each_call(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two launches per call of `few`, in a graph; of `many`, the slots there are."""
    monkeypatch.setattr(tuning, "CALLS", 2)
    monkeypatch.setattr(tuning, "TOKENS", 4)
    given, seen = trial(), []
    kernel = given.kernel(Tiles.usual(BF16))
    few = Swiglu.few
    monkeypatch.setattr(
        Swiglu, "few", lambda self, x, s, w: [seen.append(s.tolist()), few(self, x, s, w)][1]
    )
    assert tuning._few(given, kernel) == 2
    assert seen == [[[0, 1]], [[0, 1]], [[2, 3]]]  # the first compiles
    assert tuning._many(given, kernel) == 2


def test_candidates_begin_with_what_is_usual() -> None:
    assert Tiles.usual(BF16) == Tiles(tuning.HIDDEN[0], tuning.DOWN[0], tuning.MANY[0])
    assert Tiles.usual(FP32).many == tuning.MANY_FP32[0]
