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


def test_policies_are_told_against_their_controls(tmp_path: Path) -> None:
    def figure(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1}

    exact = {
        "share": "50%", "policy": "on-demand", "exact": True, "identical": True, "bytes": 200.0,
        "delta_nll": figure(0), "beyond": {}, "speed": None,
    }  # fmt: skip
    lossy = {
        **exact, "policy": "buddy", "exact": False, "identical": False, "bytes": 50.0,
        "delta_nll": figure(0.25), "kl": figure(0.3), "same_top1": figure(0.75),
        "substituted": 2.0, "skipped": 0.5, "substituted_mass": 0.5, "skipped_mass": 0.1,
        "beyond": {"buddy (random)": figure(-0.2), "buddy (drop)": figure(0.0)},
        "speed": {"ratio": 0.8, "spread": [0.7, 0.9], "bytes": 1.0, "baseline_bytes": 4.0},
    }  # fmt: skip
    timed = {"share": "50%", "policy": "paper", "speed": lossy["speed"]}
    (tmp_path / "p.json").write_text(json.dumps({"buddy": [exact, lossy, timed]}))
    page = "<!-- results: p.json buddy -->\n<!-- end -->"
    assert tables.rewritten(page, tmp_path).splitlines()[3:-1] == [
        "| 50% | `on-demand` | exact |  |  |  |  |  |  | 1.00 |  |",
        "| 50% | `buddy` | +0.250 (+0.150..+0.350) | 0.300 | 75.0 % | 2.50 | 0.60 | "
        "-0.200 (-0.300..-0.100) | +0.000 (-0.100..+0.100) | 0.25 | 0.80 (0.70-0.90) |",
        "| 50% | `paper` |  |  |  |  |  |  |  | 0.25 | 0.80 (0.70-0.90) |",
    ]
