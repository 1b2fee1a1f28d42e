"""The commands run end to end on small models, and their last line is what it is said to be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DECODE = {
    "model", "budget_fraction", "contestant", "format", "tpot_ms", "tpot_min_ms", "tpot_max_ms",
    "ttft_ms", "bytes_per_token", "hit_rate", "stall_ms", "rss_bytes", "floor_own_ms",
    "floor_belady_ms", "over_floor_own", "missed_over_belady", "against",
}  # fmt: skip


def run(script: str, *arguments: str) -> tuple[dict[str, Any], str]:
    """The last line, and everything printed."""
    done = subprocess.run(
        [sys.executable, f"bench/{script}", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stdout


SMALL = ("--smoke", "--cells", "coarse:50", "--repeats", "1")


def test_decode_smoke() -> None:
    ours = "understudy,understudy-noprefetch"  # `make bench-smoke` runs them all
    last, printed = run("decode.py", *SMALL, "--contestants", ours)
    played = [row for row in last["cells"] if not row["skipped"]]
    names = {row["contestant"] for row in played}
    assert {"understudy", "understudy-noprefetch"} <= names
    assert all(name.startswith("understudy") for name in names)
    for row in played:
        assert row.keys() >= DECODE
        assert 0 < row["tpot_min_ms"] <= row["tpot_ms"] <= row["tpot_max_ms"]
        assert row["floor_belady_ms"] <= row["floor_own_ms"]
    assert "coarse:50 understudy / understudy-noprefetch" in last["ratios"]
    assert last["card"]["models"]["coarse"]["top_k"] == 2
    assert "ms/token" in printed


def test_prefill_smoke() -> None:
    last, _ = run("prefill.py", *SMALL, "--prompt-tokens", "64", "--contestants", "understudy")
    (row,) = [row for row in last["cells"] if row["contestant"] == "understudy"]
    assert row["bytes_once"] > 0
    assert row["tokens_per_second"] > 0


def test_overhead_smoke() -> None:
    last, _ = run("overhead.py", "--smoke", "--models", "coarse", "--steps", "3", "--repeats", "1")
    seams = ["resident", "missing", "missing + guesses"]
    device = [f"device, {name}" for name in seams] if find_spec("triton") else []
    assert [row["variant"] for row in last["rows"]] == [
        *seams, *device, "frame, eager", "frame, compiled",
    ]  # fmt: skip


def test_serve_smoke() -> None:
    last, printed = run(
        "serve.py", "--smoke", "--models", "coarse", "--batches", "1,3", "--repeats", "1"
    )
    for row, batch in zip(last["rows"], (1, 3), strict=True):
        assert row["batch"] == batch
        assert row["tokens_per_second"] > 0
        assert 0 < row["best_bytes"] <= row["bound_bytes"] <= row["union_bytes"]
    assert last["rows"][1]["union_bytes"] > last["rows"][0]["union_bytes"]
    assert "coarse batch 3 / batch 1" in last["ratios"]
    assert "of bound" in printed


def test_a_wrong_cell_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "bench/decode.py", "--cells", "huge:33"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "error: no model 'huge' to bench; use fine or coarse"
    ]
