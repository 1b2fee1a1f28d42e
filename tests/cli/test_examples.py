"""The examples are five files of at most forty lines, and they run."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest

from understudy.core import UnderstudyError
from understudy.demo import reference_model

FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))

SHOWN = {
    "generate.py": "ms per token;",
    "with_transformers.py": "Counters(events=",
    "same_bits.py": "'lfu'}: equal, bit by bit",
    "how_much_memory.py": "100 %",
    "own_evictor.py": "lru: ",
}


@pytest.fixture(scope="module")
def model() -> str:
    try:
        return str(reference_model())
    except UnderstudyError as reason:
        pytest.skip(str(reason))


def test_there_are_five_and_they_are_short() -> None:
    assert {path.name for path in EXAMPLES} == set(SHOWN)
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) <= 40, path.name


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(os.fspath(path))["main"]
    main(model, tokens="4")
    assert SHOWN[path.name] in capsys.readouterr().out
