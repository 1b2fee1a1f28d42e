"""demo and bench: their tables, their JSON, and what they refuse."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from cli.conftest import Command

from understudy import demo as demo_module
from understudy import plan
from understudy.core import UnderstudyError

DEMO_ROW = {
    "policy", "tpot_ms", "tpot_min_ms", "tpot_max_ms", "ttft_ms", "bytes_per_token", "hits",
    "late", "misses", "stall_ms", "floor_own_ms", "floor_belady_ms",
}  # fmt: skip


@pytest.fixture
def widen(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A twin maker that only copies; gives the list of what it made."""
    made: list[Path] = []

    def copy(src: Path, dst: Path, hidden: int, experts: int, progress: Any) -> None:
        shutil.copytree(src, dst)
        progress(1, 1)
        made.append(dst)

    fake = ModuleType("understudy.widen")
    fake.__dict__.update(
        widen=copy, twin_bytes=lambda src, hidden, experts: (50 + 100 * experts) << 20
    )
    monkeypatch.setitem(sys.modules, "understudy.widen", fake)
    return made


# ----------------------------------------------------------------------------------------- demo


def test_demo_says_its_answer_in_the_last_line(understudy: Command, models: Path) -> None:
    ended = understudy("demo", "--small", "--rounds", "2", "--json")
    assert ended.code == 0
    answer = ended.json
    rows = answer.pop("rows")
    assert answer == {
        "model": "fine",
        "tokens": 2 * 33,
        "exact": True,
        "expert_bytes": 16 * 4096,
        "expert_budget_bytes": 3 * 8192,
    }
    assert answer["expert_budget_bytes"] <= 0.4 * answer["expert_bytes"]
    assert [row["policy"] for row in rows] == ["no-cache", "lru", "understudy"]
    assert all(set(row) == DEMO_ROW for row in rows)
    assert rows[1]["tpot_ms"] == 10
    assert rows[1]["ttft_ms"] == 500
    assert rows[1]["bytes_per_token"] == 4096
    assert (rows[1]["hits"], rows[1]["misses"]) == (2 * 32 * 3, 2 * 32)
    assert rows[1]["stall_ms"] == 1
    assert 0 < rows[1]["floor_own_ms"] < 10
    assert ended.out.count("\n") == 1


def test_demo_streams_text_and_prints_a_table(understudy: Command, models: Path) -> None:
    ended = understudy("demo", "--small", "--rounds", "1")
    assert ended.out.startswith(demo_module.OPENING + " once upon a time once")
    assert "fine: 64 KiB of experts, 38 % held" in ended.out
    assert "exact: all 33 tokens and every bit of their logits equal" in ended.out
    assert "plan: 3 of 16 experts resident (19 %)" in ended.err


def test_demo_compares_equal_budgets(understudy: Command, engine: ModuleType, models: Path) -> None:
    understudy("demo", "--small", "--rounds", "1")
    told, resident, *compared = engine.Engine.made
    assert resident["memory"] > told["memory"]
    assert [settings["memory"] for settings in compared] == [told["memory"]] * 3
    assert [settings.get("slots") for settings in compared] == [2, None, None]
    assert [s["predictor"] for s in compared] == ["none", "none", "next-gate"]


def test_demo_admits_that_it_is_not_exact(
    understudy: Command, engine: ModuleType, models: Path
) -> None:
    engine.Engine.liars = ("next-gate",)
    ended = understudy("demo", "--small", "--rounds", "1", "--json")
    assert ended.code == 1
    assert ended.json["exact"] is False
    assert "NOT exact" in ended.err


def test_the_twin_is_made_once(understudy: Command, models: Path, widen: list[Path]) -> None:
    first = understudy("demo", "--rounds", "1", "--json")
    second = understudy("demo", "--rounds", "1", "--json")
    assert (first.code, second.code) == (0, 0)
    assert len(widen) == 1
    assert widen[0].parent.name == "cache"
    assert widen[0].name.endswith("-h4-e15")  # 50 + 100 x 15 MiB is the nearest to 1.5 GiB
    assert first.json["model"] == widen[0].name


def test_no_room_for_the_twin_is_said_before_anything_is_written(
    understudy: Command, models: Path, widen: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100 << 20))
    ended = understudy("demo", "--rounds", "1")
    assert ended.code == 2
    complaint = ended.err.splitlines()[-1]
    assert complaint.startswith("error: the twin needs 1.5 GiB in ")
    assert "where 100 MiB are free" in complaint
    assert "--small" in complaint
    assert widen == []
    assert not (models.parents[1] / "cache").exists()


def test_a_retrained_model_gets_a_new_twin(models: Path) -> None:
    before = demo_module.fingerprint(models)
    (models / "model.safetensors").write_bytes(b"trained again")
    assert demo_module.fingerprint(models) != before


def test_without_reference_models_the_demo_says_where_they_should_be(
    understudy: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDERSTUDY_MODELS", str(tmp_path / "nowhere"))
    ended = understudy("demo")
    assert ended.code == 2
    assert "UNDERSTUDY_MODELS" in ended.err


# ---------------------------------------------------------------------------------------- bench


def test_bench_rows_are_pp_and_tg(understudy: Command, models: Path) -> None:
    ended = understudy("bench", str(models), "-r", "2", "-n", "20", "--memory", "60KiB", "--json")
    assert ended.code == 0
    reading, writing = ended.json["rows"]
    assert (reading["test"], writing["test"]) == ("pp235", "tg20")  # 256 of context - 20 - 1
    assert reading["policy"] == "lrfu+next-gate"
    assert reading["tokens_per_second"] == pytest.approx(235 / 0.5, rel=1e-3)
    assert writing["tokens_per_second"] == pytest.approx(100, rel=1e-3)
    assert writing["bytes_per_token"] == 4096
    assert writing["floor_own_ms"] > 0


def test_bench_compares_policies_in_turns(
    understudy: Command, engine: ModuleType, models: Path
) -> None:
    ended = understudy(
        *("bench", str(models), "-r", "1", "-n", "8", "-p", "16", "--memory", "100KiB"),
        *("--policy", "no-cache,lfu,understudy,lfru+popularity"),
    )
    assert ended.code == 0
    made = [(s["evictor"], s["predictor"], s["slots"]) for s in engine.Engine.made]
    assert made == [
        ("lru", "none", 2),
        ("lfu", "none", None),
        ("lrfu", "next-gate", None),
        ("lfru", "popularity", None),
    ]
    words = [line.split()[:2] for line in ended.out.splitlines()]
    assert ["pp16", "no-cache"] in words
    assert ["tg8", "lfru+popularity"] in words
    assert "±" in ended.out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--policy", "lru,lfuu"), "no policy named 'lfuu'; did you mean 'lfu'?"),
        (("--policy", "lru+nextgate"), "no policy named 'nextgate'; did you mean 'next-gate'?"),
        (("-n", "300"), "300 new tokens leave no room for a prompt in a context of 256"),
    ],
)
def test_bench_refuses_what_cannot_work(
    understudy: Command, models: Path, arguments: tuple[str, ...], complaint: str
) -> None:
    ended = understudy("bench", str(models), *arguments)
    assert ended.code == 2
    assert complaint in ended.err.splitlines()[-1]


def test_engines_that_do_not_fit_beside_each_other_are_refused(
    understudy: Command, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "free_memory", lambda: 1 << 10)
    ended = understudy("bench", str(models), "--policy", "lru,lfu", "--memory", "100KiB")
    assert ended.code == 2
    assert "2 policies side by side need" in ended.err


# ---------------------------------------------------------------------------------- the floors


def test_floors_take_the_larger_of_disk_and_memory() -> None:
    from understudy.bench import Rates

    rates = Rates(engine=None, disk=10.0, memory=100.0)  # type: ignore[arg-type]
    assert rates.floor(disk_bytes=50, memory_bytes=100) == 5.0
    assert rates.floor(disk_bytes=1, memory_bytes=100) == 1.0


def test_the_clairvoyant_pays_for_what_nobody_could_have_kept() -> None:
    from understudy.bench import clairvoyant_bytes
    from understudy.core import LayerEvent, Phase

    rows = [[0, 1], [0, 2], [0, 1], [0, 2]]
    phases = [Phase.PREFILL, *[Phase.DECODE] * 3]
    events = [
        LayerEvent(i, 0, p, [row]) for i, (row, p) in enumerate(zip(rows, phases, strict=True))
    ]
    size = plan.fit(
        100,
        dense=0,
        kv=0,
        activations=0,
        slot_bytes=10,
        experts=4,
        context=1,
        expert_bytes=7,
        slots=2,
    )
    assert clairvoyant_bytes(events, size, Phase.PREFILL) == 2 * 7
    assert clairvoyant_bytes(events, size, Phase.DECODE) == 3 * 7  # 0 stays; 2, 1, 2 come again


def test_policy_names() -> None:
    from understudy.bench import Policy

    assert Policy.parse("no-cache").slots == 2
    assert Policy.parse(" lfu ") == Policy("lfu", "lfu", "none")
    assert Policy.parse("lfu+next-gate") == Policy("lfu+next-gate", "lfu", "next-gate")
    with pytest.raises(UnderstudyError, match="belady"):
        Policy.parse("belady")
