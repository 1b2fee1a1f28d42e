"""Cells, contestants and limits as they are written and read."""

from __future__ import annotations

import pytest

from bench.cells import BESIDE_BYTES, Cell, parse_cells
from bench.contestants import TABLE, CannotRun, Contestant, chosen, prepared
from bench.memory_limit import hierarchy
from bench.show import progress
from understudy.core import UnderstudyError


def test_cells_are_read_in_order_and_once() -> None:
    cells = parse_cells("fine:33, coarse:ram,fine:33,")
    assert cells == [Cell("fine", 33.0), Cell("coarse", None)]
    assert [cell.name for cell in cells] == ["fine:33", "coarse:ram"]


@pytest.mark.parametrize("text", ["medium:33", "fine", "fine:0", "fine:101", "fine:x"])
def test_a_cell_that_is_none_says_how_one_is_written(text: str) -> None:
    with pytest.raises(UnderstudyError, match="fine"):
        Cell.parse(text)


def test_the_limit_is_the_share_of_the_model_and_what_python_needs() -> None:
    cell = Cell.parse("fine:25")
    assert cell.budget(4000) == 1000
    assert cell.limit(4000) == 1000 + BESIDE_BYTES
    assert Cell.parse("fine:ram").limit(4000) is None


def test_a_beginning_names_all_that_begin_so() -> None:
    assert [one.name for one in chosen("llama.cpp,understudy")] == [
        "understudy",
        "llama.cpp-bf16",
        "llama.cpp-q8_0",
        "llama.cpp-q4_0",
    ]
    assert chosen(None) == list(TABLE)
    with pytest.raises(UnderstudyError, match=r"vllm.*llama\.cpp-bf16"):
        chosen("vllm")


def test_a_peer_that_is_not_installed_says_what_installs_it(tmp_path) -> None:
    peer = Contestant("peer", "nowhere:Peer", needs=("no_such_package_here",))
    with pytest.raises(CannotRun, match=r"no_such_package_here.*make bench-peers"):
        prepared(peer, tmp_path, progress)


def test_a_group_is_made_inside_our_own(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    (tmp_path / "memory/us").mkdir(parents=True)
    found = hierarchy("4:memory:/us\n0::/\n", tmp_path)
    assert not isinstance(found, str)
    assert (found.parent, found.limit) == (tmp_path / "memory/us", "memory.limit_in_bytes")


def test_in_v2_it_is_made_beside_our_own(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    (tmp_path / "slice/us").mkdir(parents=True)
    (tmp_path / "cgroup.controllers").write_text("memory\n")
    (tmp_path / "slice/cgroup.subtree_control").write_text("cpu memory\n")
    found = hierarchy("0::/slice/us\n", tmp_path)
    assert not isinstance(found, str)
    assert (found.parent, found.limit) == (tmp_path / "slice", "memory.max")


def test_without_root_the_reason_is_given(monkeypatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert hierarchy() == "a memory limit from outside needs root"
