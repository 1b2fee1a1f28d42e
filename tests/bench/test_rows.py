"""Rows are computed from rounds as anybody would by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import rows, show
from bench.cells import Cell
from bench.contestants import chosen
from bench.match import Entry, Rates, Score
from bench.runner import Lap


def lap(seconds: float, **more: object) -> dict[str, object]:
    return Lap(ttft=1.0, seconds=seconds, steps=10, **more).as_dict()


@pytest.fixture
def score() -> Score:
    own, peer = chosen("understudy")[0], chosen("llama.cpp-bf16")[0]
    counted = {
        "read_bytes": 1000, "needed_bytes": 800, "memory_bytes": 4000, "best_bytes": 400,
        "lookups": 40, "hits": 30, "late": 2, "stall_seconds": 0.1,
        "prompt_read_bytes": 300, "prompt_once_bytes": 200, "prompt_stall_seconds": 0.0,
    }  # fmt: skip
    entries = [
        Entry(own, laps=[lap(s, **counted) for s in (1.0, 2.0, 4.0)], file_bytes=5000),
        Entry(peer, laps=[lap(s) for s in (4.0, 6.0, 8.0)], file_bytes=5000),
        Entry(chosen("accelerate")[0], skipped="not installed"),
    ]
    return Score(Cell("fine", 33.0), entries, Rates(Path("x"), 1, disk=1600.0, memory=8000.0), 512)


def test_a_row_of_our_own(score) -> None:
    row = rows.decode_rows(score, active_bytes=500, model_bytes=5000)[0]
    assert (row["tpot_ms"], row["tpot_min_ms"], row["tpot_max_ms"]) == (200.0, 100.0, 400.0)
    assert (row["bytes_per_token"], row["hit_rate"], row["stall_ms"]) == (100, 0.75, 10.0)
    assert row["floor_own_ms"] == 50.0  # 80 bytes from disk at 1600/s; 400 from memory at 8000/s
    assert row["floor_belady_ms"] == 50.0  # 40 bytes take 25 ms, but memory takes 50
    assert (row["over_floor_own"], row["missed_over_belady"]) == (4.0, 2.0)
    assert row["against"] == {"llama.cpp-bf16": 0.3333}  # median of 1/4, 2/6, 4/8


def test_a_peer_and_one_that_is_missing(score) -> None:
    _, peer, missing = rows.decode_rows(score, active_bytes=500, model_bytes=5000)
    assert (peer["tpot_ms"], peer["bytes_per_token"], peer["hit_rate"]) == (600.0, None, None)
    assert peer["against"] == {"understudy": 3.0}
    assert missing["skipped"] == "not installed"
    text = show.table([peer, missing], show.DECODE_COLUMNS)
    assert "accelerate: skipped, not installed" in text
    assert "600" in text


def test_reading_a_prompt(score) -> None:
    row = rows.prefill_rows(score, active_bytes=500, model_bytes=5000)[0]
    assert (row["ttft_ms"], row["tokens_per_second"]) == (1000.0, 512.0)
    assert (row["bytes_read"], row["bytes_once"], row["read_over_once"]) == (300, 200, 1.5)
