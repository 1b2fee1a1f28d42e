"""The choice of a kernel: measured once, written down, read again, and pinned by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.unit.experts.test_native import _Module
from understudy import native
from understudy.core import ByteRange, ExpertLayout, Piece, UnderstudyError
from understudy.experts import kernels
from understudy.experts.compute import ExpertMlp

LAYOUT = ExpertLayout(
    (ByteRange(0, 0, 3 * 64 * 32 * 2),),
    {
        "gate_up_proj": (Piece(0, 0, "bfloat16", (64, 64), (64, 1)),),
        "down_proj": (Piece(0, 8192, "bfloat16", (64, 32), (32, 1)),),
    },
)
built = pytest.mark.skipif(native.library() is None, reason=f"no kernel: {native.why_not()}")


def choose(asked: str = "auto") -> kernels.Choice:
    return kernels.choose(asked, ExpertMlp(_Module()), LAYOUT, torch.bfloat16)


@pytest.mark.parametrize(
    ("asked", "rows"),
    [("auto", None), ("torch", 0), ("native", kernels.NATIVE_ROWS), ("native:3", 3)],
)
def test_names(asked: str, rows: int | None) -> None:
    assert kernels.parse(asked) == rows


@pytest.mark.parametrize("asked", ["", "fast", "native:", "native:0", "native:x", "torch:1"])
def test_names_that_mean_nothing(asked: str) -> None:
    if asked == "native:":
        assert kernels.parse(asked) == kernels.NATIVE_ROWS
        return
    with pytest.raises(UnderstudyError, match="use auto, torch, native"):
        kernels.parse(asked)


@built
def test_the_first_measurement_holds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path)
    times = {1: (10.0, 20.0), 2: (10.0, 20.0), 4: (30.0, 20.0), 8: (1.0, 20.0)}
    monkeypatch.setattr(kernels, "_measure", lambda *a: iter(times.items()))
    first = choose()
    assert first.rows == 2  # up to the first that is slower, whatever comes after it
    assert first.name == "native:2"
    monkeypatch.setattr(kernels, "_measure", lambda *a: pytest.fail("measured twice"))
    assert choose() == first
    assert choose("torch").rows == 0  # pinned by name, whatever was measured


@built
def test_a_damaged_note_is_measured_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(kernels, "_measure", lambda *a: iter({1: (1.0, 2.0)}.items()))
    choose()
    (note,) = (tmp_path / "kernels").glob("choice-*.json")
    note.write_text("{")
    assert choose().rows == 1


@built
def test_where_nothing_can_be_written_the_choice_is_fixed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "kernels").write_text("a file in the way")
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(kernels, "_measure", lambda *a: pytest.fail("measured"))
    assert choose().rows == kernels.NATIVE_ROWS


@built
def test_a_measurement_takes_both_kernels_and_leaves_the_mlp_as_it_was() -> None:
    mlp = ExpertMlp(_Module(), native_rows=5)
    found = dict(kernels._measure(mlp, LAYOUT, torch.bfloat16))
    assert tuple(found) == kernels.TRIED
    assert all(ours > 0 and theirs > 0 for ours, theirs in found.values())
    assert mlp.native_rows == 5
