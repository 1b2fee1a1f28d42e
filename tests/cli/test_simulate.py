"""simulate: its table, its files, and what it refuses. The trace itself comes from a stand-in."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from cli.conftest import Command
from unit.policies.traces import at_random

from understudy.core import UnderstudyError
from understudy.plan import MIB
from understudy.simulate import Machine

SHAPES = {
    "models": [
        {
            "name": name,
            "n_moe_layers": layers,
            "n_experts": experts,
            "derived": {"bytes_per_expert_bf16": 8 * MIB, "bytes_per_expert_fp8": 4 * MIB},
        }
        for name, layers, experts in (("Same", 2, 8), ("Other", 3, 8))
    ]
}
HALF = ("--memory", "50%")


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the next trace that is read will say: two layers of eight experts of one MiB."""
    events = at_random(1, steps=30, layers=2, experts=8, k=2)
    shape = SimpleNamespace(model="tiny", experts=(8, 8), expert_bytes=(MIB, MIB), top_k=2)
    found = SimpleNamespace(shape=shape, events=events)
    fake = ModuleType("understudy.trace")
    fake.__dict__.update(read=lambda path: found, import_csv=lambda path: found)
    monkeypatch.setitem(sys.modules, "understudy.trace", fake)
    return found


@pytest.fixture
def shapes(tmp_path: Path) -> str:
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps(SHAPES), encoding="utf-8")
    return str(path)


def test_a_row_per_budget_link_and_policy_and_the_oracle(
    understudy: Command, traces: SimpleNamespace
) -> None:
    ended = understudy(
        "simulate", "t.parquet", "--memory", "25%,8MiB", "--policies", "lru,lrfu+last-token",
        "--link", "1GB/s,2GB/s", "--json",
    )  # fmt: skip
    assert ended.code == 0
    answer = ended.json
    assert [(r["memory_bytes"], r["link_bytes_per_second"]) for r in answer["rows"][::3]] == [
        (4 * MIB, 1e9), (4 * MIB, 2e9), (8 * MIB, 1e9), (8 * MIB, 2e9),
    ]  # fmt: skip
    policies = [row["policy"] for row in answer["rows"]]
    assert policies == ["lru", "lrfu+last-token", "belady"] * 4
    lru, _, belady = answer["rows"][:3]
    assert lru["slots"] == 4 and lru["counters"]["hits"] < belady["counters"]["hits"]
    assert lru["floor_belady_ms"] == belady["floor_own_ms"]
    assert (answer["experts"], answer["expert_bytes"]) == (16, 16 * MIB)


def test_misses_computed_in_place(understudy: Command, traces: SimpleNamespace) -> None:
    asked = ("simulate", "t.parquet", *HALF, "--policies", "lru,lru+cpu-split", "--link", "1GB/s")
    ended = understudy(*asked, "--host", "3GB/s", "--json")
    assert ended.code == 0
    fetch, split, _ = ended.json["rows"]
    assert fetch["counters"]["computed_in_place"] == 0 < split["counters"]["computed_in_place"]
    assert split["tpot_mean_ms"] < fetch["tpot_mean_ms"]
    assert ended.json["machines"][0]["host"] == 3e9
    refused = understudy(*asked)
    assert refused.code == 2
    assert "try --host 40GB/s" in refused.err


def test_belady_is_not_run_twice(understudy: Command, traces: SimpleNamespace) -> None:
    ended = understudy(
        "simulate", "t.parquet", "--policies", "belady,lru", "--memory", "50%", "--json"
    )  # fmt: skip
    assert [row["policy"] for row in ended.json["rows"]] == ["lru", "belady"]


def test_the_table(understudy: Command, traces: SimpleNamespace) -> None:
    ended = understudy("simulate", "t.parquet", "--memory", "50%", "--policies", "no-cache")
    assert ended.code == 0
    assert "tiny: 16 MiB of experts" in ended.out
    assert ended.out.splitlines()[2].split()[:8] == [
        "8", "MiB", "(50", "%)", "2", "GB/s", "no-cache", "0.0",
    ]  # fmt: skip


def test_slots_may_be_told_in_k(understudy: Command, traces: SimpleNamespace) -> None:
    ended = understudy("simulate", "t.parquet", *HALF, "--policies", "paper-on-demand", "--json")
    assert [row["slots"] for row in ended.json["rows"]] == [4, 8]


def test_the_frame_is_per_token(understudy: Command, traces: SimpleNamespace) -> None:
    def tpot(frame: str) -> float:
        ended = understudy(
            "simulate", "t.parquet", "--memory", "100%", "--frame", frame, "--json"
        )  # fmt: skip
        return float(ended.json["rows"][0]["tpot_ms"])

    assert tpot("10") == pytest.approx(tpot("0") + 10)


def test_files_are_written_whole(
    understudy: Command, traces: SimpleNamespace, tmp_path: Path
) -> None:
    out, plot = tmp_path / "o.json", tmp_path / "my.plot.png"
    ended = understudy(
        "simulate", "t.parquet", *HALF, "-o", str(out), "--plot", str(plot), "--json"
    )
    assert ended.code == 0
    assert json.loads(out.read_text(encoding="utf-8")) == ended.json
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["my.plot.png", "o.json"]


def test_the_bytes_of_another_model(
    understudy: Command, traces: SimpleNamespace, shapes: str
) -> None:
    ended = understudy(
        "simulate", "t.parquet", "--memory", "25%", "--shape", "Same:fp8", "--shapes", shapes,
        "--json",
    )  # fmt: skip
    assert (ended.json["model"], ended.json["slot_bytes"]) == ("Same:fp8", 4 * MIB)
    assert ended.json["rows"][0]["slots"] == 4


def test_the_published_accounting_has_no_clock(
    understudy: Command, traces: SimpleNamespace
) -> None:
    ended = understudy(
        "simulate", "t.parquet", "--memory", "25%", "--policies", "lru-global",
        "--accounting", "published", "--json",
    )  # fmt: skip
    assert [row["policy"] for row in ended.json["rows"]] == ["lru-global", "belady"]
    assert set(ended.json["rows"][0]) == {
        "memory_bytes", "policy", "lookups", "hits", "decode_lookups", "decode_hits", "bytes_read",
    }  # fmt: skip


def test_a_published_curve_beside_both_accountings(
    understudy: Command, traces: SimpleNamespace, tmp_path: Path
) -> None:
    curve = tmp_path / "curve.csv"
    curve.write_text(
        "budget_mib,policy,hit_pct_cum,hit_pct_decode\n4,lru,50,50\n16,belady,80,80\n4,layer,1,1\n",
        encoding="utf-8",
    )
    ended = understudy("simulate", "t.csv", "--against", str(curve), "--json")
    assert ended.code == 0
    lru, belady = ended.json["rows"]
    assert (lru["policy_here"], lru["ours_event_atomic"]["slots"]) == ("lru-global", 4)
    # Where everything fits, the accountings cannot differ.
    assert (
        belady["ours_published_accounting"]["hit_pct"] == belady["ours_event_atomic"]["hit_pct"]
    )  # fmt: skip
    assert "no such policy here: layer" in ended.err
    off = abs(lru["ours_published_accounting"]["hit_pct"] - 50)
    assert ended.json["furthest_pct_points"] >= round(off, 3) > 0


def test_costs_measured_on_a_model(
    understudy: Command, traces: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from understudy.cli import simulate as command

    monkeypatch.setattr(command, "measured", lambda model: Machine(3e9, 9e9, frame=1e-3))

    def machines(*more: str) -> Any:
        return understudy("simulate", "t", *HALF, "--measure", "model", *more, "--json").json[
            "machines"
        ]

    assert [(m["link"], m["compute"]) for m in machines()] == [(3e9, 9e9)]
    assert [(m["link"], m["frame"]) for m in machines("--link", "1GB,2GB")] == [
        (1e9, 1e-3), (2e9, 1e-3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "cure"),
    [
        (["--policies", "lruu"], "did you mean 'lru'"),
        ([*HALF, "--policies", "lrfu+next-gate"], "take last-token or popularity"),
        ([*HALF, "--policies", "lru+next-gate+speculated"], "has no look-ahead; record one"),
        ([*HALF, "--policies", "lru+buddy"], "needs a profile of this model"),
        (["--memory", "1MiB"], "the smallest --memory is 2097152"),
        (["--memory", "auto"], "write 10%,50% or 8GiB"),
        (["--memory", "much"], "write 8GiB"),
        (["--link", "50%"], "write 2GB/s or 500MiB/s"),
        (["--compute", "fast"], "write 2GB/s or 500MiB/s"),
        (["--accounting", "mine"], "event or published"),
        (["--accounting", "published", "--policies", "lru+last-token"], "use --accounting event"),
        (["--shape", "Same"], "--shapes FILE"),
        (["--plot", "curve.txt"], "ends in png, svg, pdf"),
        (["-o", "nowhere/o.json"], "there is no folder nowhere"),
        (["--against", "nowhere.csv"], "columns budget_mib, policy"),
    ],
)
def test_what_it_refuses_names_the_cure(
    understudy: Command, traces: SimpleNamespace, arguments: list[str], cure: str
) -> None:
    ended = understudy("simulate", "t.parquet", *arguments)
    assert ended.code == 2
    assert cure in ended.err
    assert ended.out == ""


@pytest.mark.parametrize(
    ("shape", "cure"),
    [
        ("Other", "Other has 3 layers of 8 experts and this trace 2 of 8; these fit: Same"),
        ("Unknown", "has no shape 'Unknown'; these fit: Same"),
        ("Same:int3", "it is bf16, fp8, 4p5bpw"),
    ],
)
def test_a_shape_that_does_not_fit(
    understudy: Command, traces: SimpleNamespace, shapes: str, shape: str, cure: str
) -> None:
    ended = understudy("simulate", "t.parquet", "--shape", shape, "--shapes", shapes)
    assert ended.code == 2
    assert cure in ended.err


def test_no_shape_fits(understudy: Command, traces: SimpleNamespace, shapes: str) -> None:
    traces.shape = SimpleNamespace(**{**vars(traces.shape), "experts": (9, 9)})
    traces.events = [replace(event, ids=[[0, 1]]) for event in traces.events]
    ended = understudy("simulate", "t.parquet", "--shape", "Same", "--shapes", shapes)
    assert f"no shape in {shapes} fits" in ended.err


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    from understudy.whole import replacing

    (tmp_path / "taken").mkdir()
    asked = replacing(tmp_path / "taken")
    with pytest.raises(UnderstudyError, match="name another file"), asked as temporary:
        temporary.write_text("x", encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
