"""The tables of the pages say what the benches wrote, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import pages as tables
from docs import pages

RESULTS = tables.ROOT / "docs" / "results"


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert tables.rewritten(text, RESULTS) == text, "python bench/pages.py writes them anew"


def row(contestant: str, ms: float, rounds: int = 3) -> dict[str, object]:
    return {
        "model": "fine", "budget_fraction": 0.33, "contestant": contestant, "rounds": rounds,
        "tpot_ms": ms, "tpot_min_ms": ms - 1, "tpot_max_ms": ms + 1,
    }  # fmt: skip


def test_a_block_is_made_of_its_file(tmp_path: Path) -> None:
    cells = [row("understudy", 10.0), row("llama.cpp-bf16", 55.25), row("understudy-int4", 5.0)]
    cells.append({"contestant": "accelerate", "skipped": "not installed"})
    (tmp_path / "a.json").write_text("a card\n" + json.dumps({"cells": cells}))
    page = "before\n<!-- results: a.json beside -->\nold\n<!-- end -->\nafter\n"
    assert tables.rewritten(page, tmp_path).splitlines() == [
        "before",
        "<!-- results: a.json beside -->",
        "| ms per token | experts | Understudy | llama.cpp | transformers, accelerate |",
        "| --- | --- | --- | --- | --- |",
        "| fine:33 | bf16 | **10.0** (9.0-11.0) | 55.2 (54.2-56.2) |  |",
        "<!-- end -->",
        "after",
    ]


def test_an_unknown_kind_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(KeyError, match="colours"):
        tables.rewritten("<!-- results: a.json colours -->\n<!-- end -->", tmp_path)
