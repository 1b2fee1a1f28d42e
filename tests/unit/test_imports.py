"""The house stays a house: rooms import downwards only, and minds touch nothing.

The table is the one of the house's plan. A new module must be given its place here first.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "understudy"

# Rooms of one floor never import each other, except where they stand in one cell.
FLOORS: list[list[set[str]]] = [
    [{"core", "registry", "whole"}],
    [
        {"policies"},
        {"checkpoint"},
        {"formats"},
        {"trace"},
        {"profile"},
        {"widen"},
        {"native"},
        {"tasks"},
        {"texts"},
        {"intervals"},
    ],
    [{"experts"}, {"model", "families", "frame", "captured", "steady_cache"}, {"dense"}],
    [{"simulate"}, {"plan"}, {"machine"}, {"summary"}],
    [
        {
            "engine",
            "loading",
            "assembly",
            "on_device",
            "turns",
            "anatomy",
            "evaluate",
            "packing",
            "learn",
            "batch",
        },
    ],
    [
        {
            "cli",
            "serve",
            "traffic",
            "bench",
            "compare",
            "demo",
            "checkup",
            "quality",
            "lm_harness",
            "__init__",
            "__main__",
        },
    ],
]

# What a mind has no business with: files, threads, clocks, tensors.
HANDS = {
    "io",
    "mmap",
    "os",
    "pathlib",
    "queue",
    "random",
    "socket",
    "tempfile",
    "threading",
    "time",
}


def floor_of(room: str) -> int:
    return next(i for i, floor in enumerate(FLOORS) for cell in floor if room in cell)


def cell_of(room: str) -> set[str]:
    return next(cell for floor in FLOORS for cell in floor if room in cell)


def allowed(importer: str, imported: str) -> bool:
    """3 may call 1 and 0 but not 2; everything else may call any floor below its own."""
    above, below = floor_of(importer), floor_of(imported)
    return imported in cell_of(importer) or (below < above and (above, below) != (3, 2))


def modules() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def room_of(path: Path) -> str:
    """A folder is one room; a file beside it is another."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> Iterator[str]:
    """Full dotted names of all imports, also of those inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide the direction"
            if node.module == "understudy":
                yield from (f"understudy.{alias.name}" for alias in node.names)
            elif node.module:
                yield node.module


def rooms_used_by(path: Path) -> set[str]:
    own = (name.split(".") for name in imported_modules(path) if name.startswith("understudy"))
    return {parts[1] if len(parts) > 1 else "__init__" for parts in own} - {room_of(path)}


def packages_used_by(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported_modules(path)} - {"understudy"}


def named(path: Path) -> str:
    return str(path.relative_to(SOURCE))


@pytest.mark.parametrize("path", modules(), ids=named)
def test_rooms_import_downwards_only(path: Path) -> None:
    wrong = [room for room in rooms_used_by(path) if not allowed(room_of(path), room)]
    assert not wrong, f"{named(path)} may not import {', '.join(wrong)}"


@pytest.mark.parametrize("room", ["core", "registry"])
def test_the_ground_floor_stands_on_the_standard_library(room: str) -> None:
    foreign = packages_used_by(SOURCE / f"{room}.py") - set(sys.stdlib_module_names)
    assert foreign <= {"torch"}, foreign  # torch for annotations only


@pytest.mark.parametrize("path", [p for p in modules() if room_of(p) == "policies"], ids=named)
def test_minds_touch_nothing(path: Path) -> None:
    used = packages_used_by(path)
    assert used <= set(sys.stdlib_module_names) | {"__future__"}
    assert not used & HANDS


def test_the_rules_can_tell_right_from_wrong() -> None:
    assert allowed("engine", "policies")
    assert allowed("simulate", "policies")
    assert allowed("model", "families")
    assert allowed("cli", "demo")
    assert not allowed("simulate", "experts")
    assert not allowed("experts", "model")
    assert not allowed("policies", "checkpoint")
    assert not allowed("core", "policies")
    assert not allowed("plan", "simulate")
