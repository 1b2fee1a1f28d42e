"""The benchmark of the device tier, as far as no device is needed: arithmetic, time, forced
routing, cells played on the CPU tier, processes that end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu, pages, show
from bench.device import (
    adapter,
    figures,
    micro,
    parent,
    play,
    prompts,
    schedule,
    subjects,
    ways,
)
from bench.device.adapter import Spot
from bench.device.child import Desk
from bench.device.figures import Facts, Rates, Turn
from bench.device.forced import Forced, Routes, Shape, corrupted, forced
from bench.device.host_time import Call, Profile, host_time, per_layer
from bench.device.parent import Child, Lost, Refused, Shift
from bench.device.play import Said, Table, groups
from bench.device.players import Need, need, slots_of
from bench.device.schedule import Task, TimeBudget
from bench.device.subjects import Subject
from bench.device.ways import EXACT, LOSSY, Way
from understudy import demo
from understudy.core import UnderstudyError
from understudy.engine import Anatomy, Engine

ROOT = Path(__file__).parents[2]
CPU = Spot("cpu")


# --------------------------------------------------------------------------- figures and targets

FACTS = Facts(
    layers=4, experts=32, top_k=2, expert_bytes=100, resident_bytes=1000, dense_bytes=800,
    trained=True, words="",
)  # fmt: skip
RATES = Rates(device=10_000.0, link=1000.0, cpu=2000.0)


def turn(tpot: float, **more: Any) -> Turn:
    """Ten steps of eight lookups, half of them hits, the others brought."""
    known: dict[str, Any] = {
        "steps": 10, "seconds": 10 * tpot, "ttft": 1.0, "read_bytes": 5000, "needed_bytes": 4000,
        "lookups": 80, "hits": 40, "late": 10, "stall_seconds": 2.0,
    }  # fmt: skip
    return Turn(**(known | more))


def head(name: str, **more: Any) -> dict[str, Any]:
    known = {
        "model": "twin", "budget_fraction": 0.5, "contestant": name, "promise": EXACT,
        "driven": "host", "layers": 4, "group": "50/0", "skipped": None, "exact": "yes",
    }  # fmt: skip
    return known | more


def made(name: str, *tpots: float, **more: Any) -> dict[str, Any]:
    return figures.row(head(name, **more), [turn(t) for t in tpots], FACTS, RATES)


def test_a_row_is_what_anybody_would_compute_by_hand() -> None:
    row = made("lru", 0.8, 0.5, 1.0)
    assert (row["tpot_ms"], row["tpot_min_ms"], row["tpot_max_ms"]) == (800.0, 500.0, 1000.0)
    assert (row["bytes_per_token"], row["hit_rate"], row["late_rate"]) == (500, 0.5, 0.125)
    assert row["stall_ms"] == 200.0
    assert row["link_share"] == 0.625  # 500 bytes in 0.8 s, where 800 could have come
    # 800 dense bytes and 8 experts of 100 are read in 0.16 s; 400 needed bytes come in 0.4 s.
    assert row["floor_ms"] == 400.0
    assert row["over_floor"] == 2.0


def test_the_device_s_own_clock_is_believed() -> None:
    row = figures.row(head("lru"), [turn(9.0, device_seconds=8.0)], FACTS, RATES)
    assert (row["tpot_ms"], row["clock"]) == (800.0, "device")


def test_what_the_cpu_computes_is_read_there() -> None:
    """1600 bytes of the 8000 per step: device 0.144 s, link 0.4 s, CPU 0.8 s."""
    turns = [turn(1.0, cpu_bytes=16_000)]
    assert figures.floor_of(turns, FACTS, RATES) == pytest.approx(0.8)
    assert figures.floor_of(turns, FACTS, Rates(device=1.0, link=1.0)) is None


def test_without_bandwidths_or_counters_there_is_no_floor() -> None:
    row = figures.row(head("lru"), [turn(0.8)], FACTS, Rates())
    assert (row["floor_ms"], row["over_floor"], row["link_share"]) == (None, None, None)
    blind = turn(0.8, read_bytes=None, needed_bytes=None, lookups=None, hits=None)
    row = figures.row(head("accelerate"), [blind], FACTS, RATES)
    assert (row["floor_ms"], row["bytes_per_token"], row["hit_rate"]) == (None, None, None)
    assert "accelerate" in show.table([row], figures.COLUMNS)


def test_a_ratio_is_of_rounds_where_both_alternated() -> None:
    one, other = made("router-pf", 2.0, 8.0, 3.0), made("lru", 1.0, 2.0, 1.0)
    assert figures.ratio(one, other) == 3.0  # of 2, 4, 3
    apart = made("lru", 1.0, 2.0, 1.0, group="50/1")
    assert figures.ratio(one, apart) == 3.0  # 3 / 1
    assert figures.ratio(one, figures.row(head("lru"), [], FACTS, RATES)) is None


def verdicts(rows: list[dict[str, Any]], parts: Any = None) -> dict[tuple[str, str], Any]:
    found = [target.as_dict() for target in figures.targets(rows, parts or {}, [])]
    return {(t["name"].split(":")[0].split(",")[0], t["where"]): t for t in found}


def test_targets_of_nothing_were_not_run() -> None:
    found = figures.targets([], {}, [])
    assert {target.as_dict()["met"] for target in found} == {"not run"}
    assert len(found) == 8


def test_the_paper_is_compared_with_our_fastest_exact_row() -> None:
    rows = [
        made("router-pf", 4.0, promise=LOSSY, exact="no"),
        made("lru", 1.6),
        made("lru+hint", 1.0),
        made("on-demand", 0.1),  # the paper's own
        made("device", 0.2, exact="no", driven="device"),  # fast and wrong
        made("lru+hint+cpu", 0.1, promise="equivalent", exact="tokens"),
    ]
    found = verdicts(rows)["TPOT at 50 %", "twin lru+hint"]
    assert (found["value"], found["met"], found["aim_met"]) == (4.0, "yes", "yes")
    slower = [rows[0], rows[1]]
    found = verdicts(slower)["TPOT at 50 %", "twin lru"]
    assert (found["value"], found["met"], found["aim_met"]) == (2.5, "yes", "NO")


def test_the_floor_is_judged_in_the_worst_cell_by_its_best_row() -> None:
    rows = [
        made("lru", 0.8),  # 2.0 x its floor
        made("lru+hint", 0.6),  # 1.5
        made("lru+hint", 0.48, budget_fraction=0.25),  # 1.2
        made("device", 0.4, driven="device"),
    ]
    found = verdicts(rows)
    host = found["measured / lossless floor", "twin:50, worst of 2"]
    assert (host["value"], host["met"], host["aim_met"]) == (1.5, "yes", "NO")
    device = found["measured / lossless floor", "twin:50, worst of 1"]
    assert (device["value"], device["aim_met"]) == (1.0, "yes")


def test_kernels_and_prompts_have_targets() -> None:
    parts = {"expert bf16": {"share": 0.6}, "gather": {"share": 0.96}}
    ours = {"contestant": "lru+hint", "rounds": 1, "ttft_ms": 10.0, "over_pass": 1.05}
    peer = {"contestant": "accelerate", "rounds": 1, "ttft_ms": 40.0}
    found = {t.name: t.as_dict() for t in figures.targets([], parts, [ours, peer])}
    met = {name.split(":")[0]: t["met"] for name, t in found.items() if t["value"] is not None}
    assert met["expert kernel, 1 token, bf16"] == "NO"
    assert met["gather kernel"] == "yes"
    by_end = {name.rsplit(": ", 1)[1]: t for name, t in found.items() if "prefill" in name}
    assert (by_end["accelerate / ours"]["value"], by_end["accelerate / ours"]["met"]) == (4.0, "NO")
    assert by_end["time / one pass over the bytes"]["met"] == "yes"


def test_a_prompt_s_row_knows_one_pass() -> None:
    turns = [Turn(steps=0, seconds=0.0, ttft=t, prompt_bytes=3000) for t in (3.0, 4.0, 8.0)]
    row = figures.prefill_row(head("lru+hint"), turns, 2000, RATES)
    assert (row["ttft_ms"], row["pass_ms"], row["over_pass"]) == (4000.0, 2000.0, 2.0)
    assert (row["prompt_bytes"], row["ttft_min_ms"]) == (3000, 3000.0)


# ---------------------------------------------------------------------------------- the host's time


def test_the_host_s_time_is_wall_less_waiting_of_the_thread_that_decodes() -> None:
    wait = Call("cudaStreamSynchronize", 100.0)
    elsewhere = Call("cudaEventSynchronize", 1000.0, decodes=False)
    launch = Call("cudaLaunchKernel", 5.0)
    short = Profile(2, 0.001, [launch] * 3 + [wait])
    long = Profile(10, 0.005, [launch] * 19 + [wait] * 9 + [elsewhere] * 8)
    assert host_time(short, long) == {
        "host_calls": 4.0,  # 32 more, for 8 more tokens
        "host_wait_us": 100.0,
        "host_us": 400.0,
    }


def test_per_layer_is_what_one_more_layer_costs() -> None:
    small = {"model": "twin", "layers": 10, "host_us": 300.0, "host_calls": 25.0}
    driven = {"model": "qwen3", "layers": 48, "host_us": 310.0, "host_calls": 25.0}
    launched = {"model": "qwen3", "layers": 48, "host_us": 4100.0, "host_calls": 405.0}
    assert per_layer([driven, small]) == (0.0, "twin and qwen3")
    assert per_layer([small, launched]) == (100.0, "twin and qwen3")
    assert per_layer([small]) == (30.0, "twin, an upper bound")
    assert per_layer([{"model": "twin", "layers": 10}]) is None


# ----------------------------------------------------------------------------------------- time


def test_the_most_informative_cells_come_first() -> None:
    found = [task.name for task in schedule.tasks(["twin", "qwen3"], schedule.BUDGETS)]
    assert found == [
        "micro", "twin:50", "qwen3:50", "prefill:25", "twin:25", "qwen3:25", "twin:75",
        "qwen3:75", "twin:10", "qwen3:10", "formats",
    ]  # fmt: skip
    only = schedule.tasks(["twin", "qwen3"], (50, 25), ["micro", "qwen3", "twin:25"])
    assert [task.name for task in only] == ["micro", "qwen3:50", "twin:25", "qwen3:25"]
    assert "prefill:25" not in [t.name for t in schedule.tasks(["qwen3"], (50,))]


def test_what_would_not_end_in_time_is_left_out_by_name() -> None:
    now = [0.0]
    budget = TimeBudget(200.0, clock=lambda: now[0])
    first, second, third = Task("twin", 50), Task("twin", 25), Task("twin", 75)
    assert budget.allows(first)
    with budget.spending(first):
        now[0] = 130.0
    assert budget.allows(second)  # half of 130 s fits into 70
    with budget.spending(second):
        now[0] = 160.0
    assert budget.allows(third)  # the last one took 30
    now[0] = 190.0
    assert not budget.allows(third)
    assert budget.left_out == ["twin:75: 10 s were left, 15 needed"]
    assert not budget.allows(Task("micro"))  # cannot be done in part


# ---------------------------------------------------------------------------------- forced routing

TINY = Shape(hidden=64, width=32, heads=2, kv_heads=1, head=32, vocab=4096)


@pytest.fixture(scope="module")
def routes() -> Routes:
    """20 tokens, 5 of them the prompt; 4 layers of 8 experts, top 2."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.rand(20, 4, 8, generator=generator).argsort(-1)[..., :2]
    weights = torch.rand(20, 4, 2, generator=generator)
    return Routes(ids, weights / weights.sum(-1, keepdim=True), 5, 8)


@pytest.fixture(scope="module")
def anatomy(routes: Routes, tmp_path_factory: pytest.TempPathFactory) -> Forced:
    return forced(tmp_path_factory.mktemp("forced"), TINY, routes, recall=0.75)


def test_many_experts_lie_in_a_small_file(anatomy: Forced) -> None:
    file = anatomy.checkpoint.files[0]
    stored, size = file.stat().st_size, file.read_bytes()
    assert len(anatomy.layouts) == 32
    assert stored < sum(layout.nbytes for layout in anatomy.layouts.values())
    starts = set()
    for layout in anatomy.layouts.values():
        (read,) = layout.reads  # down, gate and up beside each other
        assert read.nbytes == 3 * 64 * 32 * 2
        assert read.offset + read.nbytes <= stored
        starts.add(size[read.offset : read.offset + 64])
    assert len(starts) == 8  # different experts
    neighbours = [anatomy.layouts[e].reads[0].offset for e in list(anatomy.layouts)[:8]]
    assert len(set(neighbours)) == 8


def generated(engine: Engine, new: int = 7) -> list[Any]:
    engine.start_recording()
    engine.generate([1, 2, 3, 4, 5], max_new_tokens=new, ignore_eos=True, dictated=[9] * new)
    return engine.stop_recording()


@pytest.mark.parametrize("offset", [0, 6])
def test_every_position_runs_who_is_recorded_for_it(
    anatomy: Forced, routes: Routes, offset: int
) -> None:
    with Engine(anatomy, slots=8, direct_io=False, max_context=64) as engine:
        subjects._move_on(engine, offset)
        events = generated(engine)
    steps = [events[i : i + 4] for i in range(0, len(events), 4)]
    assert [len(step[0].ids) for step in steps] == [5, 1, 1, 1, 1, 1, 1]
    start = offset
    for step in steps:
        for event in step:
            rows = [(start + i) % routes.tokens for i in range(len(event.ids))]
            assert [list(row) for row in event.ids] == routes.ids[rows, event.layer].tolist()
            asked = torch.tensor([list(row) for row in event.weights])
            assert torch.equal(asked, routes.weights[rows, event.layer].bfloat16().float())
        start += len(step[0].ids)


def test_look_ahead_is_told_the_corrupted_record(anatomy: Forced, routes: Routes) -> None:
    foreseen = corrupted(routes.ids, 8, 0.75, 0)
    with Engine(anatomy, slots=8, direct_io=False, max_context=64) as engine:
        events = generated(engine)
    told = [event for event in events if event.lookahead and len(event.ids) == 1]
    assert len(told) == 6 * 3
    for number, event in enumerate(told):
        row = 5 + number // 3
        assert event.lookahead[event.layer + 1][0] == [foreseen[row, event.layer + 1].tolist()]


def test_recall_is_what_was_asked_and_drawn_with_a_seed() -> None:
    ids = torch.rand(2000, 128, generator=torch.Generator().manual_seed(1)).argsort(-1)[:, :6]
    foreseen = corrupted(ids, 128, 0.9, seed=3)
    assert torch.equal(foreseen, corrupted(ids, 128, 0.9, seed=3))
    assert not torch.equal(foreseen, corrupted(ids, 128, 0.9, seed=4))
    assert float((foreseen == ids).float().mean()) == pytest.approx(0.9, abs=0.01)
    assert all(len(set(row)) == 6 for row in foreseen.tolist())
    wrong = foreseen != ids
    among = (foreseen[:, :, None] == ids[:, None, :]).any(-1)
    assert not (wrong & among).any()  # who is wrong is none of the row's
    assert torch.equal(corrupted(ids, 128, 1.0, 0), ids)


def test_routes_are_read_from_a_route_csv(tmp_path: Path) -> None:
    """Two layers; of the prompt's two tokens the last layer knows only the last."""
    lines = ["# route_trace v1", "# model=m n_expert=4 n_expert_used=1",
             "# layer=0 expert_bytes=10", "# layer=1 expert_bytes=10",
             "turn,phase,step,layer,slot,expert,weight",
             "0,0,0,0,0,3,1.0", "0,0,0,0,0,2,1.0", "0,0,0,1,0,1,0.5",
             "0,1,1,0,0,0,1.0", "0,1,1,1,0,2,0.25"]  # fmt: skip
    (tmp_path / "r.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    routes = Routes.read(tmp_path / "r.csv")
    assert routes.ids.tolist() == [[[3], [1]], [[2], [1]], [[0], [2]]]
    assert routes.weights[:, 1, 0].tolist() == [0.5, 0.5, 0.25]
    assert (routes.prompt, routes.experts, routes.tokens) == (2, 4, 3)


def test_the_answer_does_not_depend_on_the_cache(anatomy: Forced) -> None:
    said = []
    for slots in (4, 32):
        with Engine(anatomy, slots=slots, direct_io=False, max_context=64) as engine:
            said.append(adapter.answer(engine, None, [1, 2, 3], [4, 5, 6], keep_logits=True))
    assert said[0].logits is not None and said[1].logits is not None
    assert torch.equal(said[0].logits, said[1].logits)
    assert said[0].turn.steps == 2
    assert said[0].turn.read_bytes > said[1].turn.read_bytes or said[1].turn.hits is not None


# ------------------------------------------------------------------------------------------- ways


@pytest.mark.parametrize("way", [*ways.WAYS, ways.ALL_RESIDENT], ids=lambda way: way.name)
def test_every_row_can_be_loaded(anatomy: Forced, way: Way) -> None:
    reason = adapter.lacking(way, CPU)
    if way.peer or reason:
        pytest.skip(reason or "not ours")
    facts = subjects.facts_of(anatomy, False, "")
    slots = slots_of(way, facts, 50)
    with adapter.open_engine(
        anatomy, way, CPU, slots=slots, need=0, direct_io=False, max_context=64
    ) as engine:
        assert engine.plan.slots == slots
        assert engine.model.understudy.policies["route"] == way.options.get("route", "as-routed")


def test_what_this_version_cannot_do_is_told_by_name() -> None:
    unknown = Way("new", "", EXACT, {"no_such": 1})
    assert adapter.lacking(unknown, CPU) == "this version of Understudy has no option no_such"
    wrong = Way("new", "", EXACT, {"resolver": "no-such-resolver"})
    assert "no-such-resolver" in str(adapter.lacking(wrong, CPU))
    driven = Way("device", "", EXACT, {}, driven="device")
    assert adapter.lacking(driven, CPU) == "needs an accelerator"


def test_rows_are_chosen_in_our_order_and_mistakes_are_named() -> None:
    assert [way.name for way in ways.chosen("lru, device")] == ["device", "lru"]
    assert ways.chosen(None) == list(ways.WAYS)
    with pytest.raises(UnderstudyError, match=r"'lruu'.*router-pf"):
        ways.chosen("lruu")


def test_the_paper_s_rows_keep_nothing_and_a_budget_is_a_share_of_the_experts() -> None:
    by_name = {way.name: way for way in (*ways.WAYS, ways.ALL_RESIDENT)}
    assert slots_of(by_name["router-pf"], FACTS, 50) == 4  # two layers' worth of one token
    assert slots_of(by_name["on-demand"], FACTS, 10) == 4
    assert slots_of(by_name["lru"], FACTS, 50) == 16
    assert slots_of(by_name["resident"], FACTS, 50) == 32
    needed = need(by_name["lru"], FACTS, 50, shared=False)
    assert needed == Need(1600 + 1000 + adapter.HEADROOM, 3200)
    assert need(by_name["lru"], FACTS, 50, shared=True).host == 0


def test_a_profile_is_for_the_paper_s_row() -> None:
    changed = ways.with_profile(ways.WAYS, "p.safetensors")
    told = {way.name: way.options.get("predictor") for way in changed}
    assert told["router-pf"] == "quasi-gate"
    assert [w for w in changed if w.name != "router-pf"] == [
        w for w in ways.WAYS if w.name != "router-pf"
    ]


# ------------------------------------------------------------------------------------------- cells


def ways_named(*names: str) -> list[Way]:
    return [Way(name, "", EXACT) for name in names]


def test_who_fits_beside_whom() -> None:
    a, b, c, d = ways_named("a", "b", "c", "d")
    needs = [(a, Need(4, 1)), (b, Need(5, 1)), (c, Need(4, 1)), (d, Need(20, 1))]
    found, refused = groups(needs, device=10, host=10)
    assert [[way.name for way in group] for group in found] == [["a", "b"], ["c"]]
    assert [(way.name, reason) for way, reason in refused] == [
        ("d", "needs 20 bytes of device memory, 10 bytes are free")
    ]
    found, _ = groups(needs[:3], device=100, host=2)  # memory of the host divides, too
    assert [len(group) for group in found] == [2, 1]


def test_equal_is_bit_by_bit_and_nll_is_of_the_dictated_text() -> None:
    logits = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    one = Said([logits], [[1, 0]])
    assert one.equals(Said([logits.clone()], [[1, 0]])) == "yes"
    assert one.equals(Said([logits + 1e-6], [[1, 0]])) == "tokens"
    assert one.equals(Said([-logits], [[1, 0]])) == "no"
    expected = -(logits.log_softmax(-1)[0, 1] + logits.log_softmax(-1)[1, 0]) / 2
    assert one.nll() == pytest.approx(float(expected))


@pytest.fixture
def subject(anatomy: Forced) -> Subject:
    return Subject(
        "qwen3", anatomy, subjects.facts_of(anatomy, True, ""),
        [[1, 2, 3, 4, 5]] * 3, [[6, 7, 8]] * 3, {"max_context": 64, "direct_io": False},
        lambda engine, number: subjects._move_on(engine, 2 * number),
    )  # fmt: skip


def played(subject: Subject, chosen: Any, **more: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    table = Table(subject, CPU, None, found.append, **more)
    table.play(50, chosen)
    table.close()
    return [message for message in found if "began" not in message]


def test_a_cell_says_who_is_exact(subject: Subject) -> None:
    rows = {r["contestant"]: r for r in played(subject, ways.WAYS)}
    assert set(rows) == {way.name for way in ways.WAYS} | {"resident"}
    for name in ("lru", "lru+hint", "on-demand"):
        assert rows[name]["exact"] == "yes"
        assert len(rows[name]["turns"]) == 1  # of three rounds, two are compared
        assert rows[name]["turns"][0]["steps"] == 2
    assert rows["router-pf"]["exact"] == "no"  # a quarter of what it runs was not asked for
    assert rows["router-pf"]["nll_tokens"] == 6
    assert rows["resident"]["turns"][0]["hits"] == rows["resident"]["turns"][0]["lookups"]
    assert rows["accelerate"]["skipped"]
    assert json.dumps(list(rows.values()))


def test_a_cell_on_a_device(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """All in host memory once, whoever plays; and what needs kernels is told."""
    pretend = pytest.importorskip("pretend", reason="the pretended device is not here")
    on_device = pytest.importorskip("understudy.on_device", reason="the device tier is not here")
    devices: list[Any] = []

    def opened(asked: str) -> Any:
        devices.append(pretend.Pretend(memory=1 << 30))
        return devices[-1]

    monkeypatch.setitem(on_device.OPENERS, "pretend", opened)
    monkeypatch.setattr(adapter, "HEADROOM", 64 << 20)
    subject.settings["kernel"] = "torch"  # ours would need an interpreter
    found: list[dict[str, Any]] = []
    table = Table(subject, Spot("pretend"), None, found.append)
    table.play(50, ways.WAYS)
    assert [bool(device.pinned_bytes) for device in devices] == [True] + [False] * 7
    table.close()
    assert not any(device.pinned_bytes for device in devices)
    rows = {r["contestant"]: r for r in found if "began" not in r}
    assert {n: rows[n].get("exact") for n in ("lru", "lru+hint", "on-demand", "router-pf")} == {
        "lru": "yes", "lru+hint": "yes", "on-demand": "yes", "router-pf": "no",
    }  # fmt: skip
    assert rows["lru+hint+cpu"]["exact"] in ("yes", "tokens")
    assert "triton kernels" in rows["device"]["skipped"]
    assert rows["lru"]["turns"][0]["read_bytes"] > 0
    assert rows["resident"]["turns"][0]["read_bytes"] == 0


def test_one_that_fails_is_a_row_and_the_others_play(subject: Subject) -> None:
    broken = Way("broken", "", EXACT, {"evictor": "no-such-evictor"})
    (lru,) = ways.chosen("lru")
    rows = {r["contestant"]: r for r in played(subject, [broken, lru])}
    assert "no-such-evictor" in rows["broken"]["skipped"]
    assert rows["broken"]["turns"] == []
    assert rows["lru"]["exact"] == "yes" and rows["lru"]["skipped"] is None


def test_without_time_rows_are_left_out_and_without_a_reference_not_compared(
    subject: Subject,
) -> None:
    (lru,) = ways.chosen("lru")
    rows = played(subject, [lru], time_left=lambda: -1.0, without={"resident"})
    assert [(r["contestant"], r["skipped"]) for r in rows] == [("lru", "no time was left")]
    (row,) = played(subject, [lru], without={"resident"})
    assert row["turns"] and "exact" not in row


def test_a_lost_device_ends_the_cell_but_what_was_timed_stands(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dead:
        """Fails whatever is asked once a round has been played."""

        compute = property(lambda self: (_ for _ in ()).throw(RuntimeError("CUDA error")))

        def free_bytes(self) -> int:
            return 1 << 40

    def answer(self: Any, number: int, keep_logits: bool = False) -> Any:
        if number == 2:
            raise RuntimeError("CUDA error: an illegal memory access")
        return adapter.answer(self.engine, None, [1, 2, 3], [4, 5, 6], keep_logits)

    monkeypatch.setattr(play.Own, "answer", answer)
    found: list[dict[str, Any]] = []
    table = Table(subject, CPU, Dead(), found.append, without={"resident"})  # type: ignore[arg-type]
    with pytest.raises(play.DeviceLost, match="illegal"):
        table.play(50, ways.chosen("lru,lru+hint"))
    rows = {r["contestant"]: r for r in found if "began" not in r}
    assert "illegal" in rows["lru+hint"]["skipped"]
    assert "another row" in rows["lru"]["skipped"]
    assert len(rows["lru"]["turns"]) == 1


def test_a_long_prompt_is_read_in_turns() -> None:
    fine = demo.models_folder() / "fine"
    facts = subjects.facts_of(Anatomy.of(fine), True, "")
    found: list[dict[str, Any]] = []
    chosen = ways.chosen("lru+hint,accelerate")
    broken = Way("broken", "", EXACT, {"evictor": "no-such-evictor"})
    subject = Subject("twin", fine, facts, [], [])
    prompts.play(subject, 50, [*chosen, broken], CPU, None, found.append, tokens=48, rounds=2)
    rows = {r["contestant"]: r for r in found if "began" not in r}
    ours = rows["lru+hint"]
    assert len(ours["turns"]) == 2 and ours["skipped"] is None
    assert 0 < ours["once_bytes"] <= facts.all_expert_bytes
    assert all(t["ttft"] > 0 and t["prompt_bytes"] > 0 for t in ours["turns"])
    assert rows["accelerate"]["skipped"] == "needs an accelerator"
    assert "no-such-evictor" in rows["broken"]["skipped"] and not rows["broken"]["turns"]


# ---------------------------------------------------------------------------------------- children

SCRIPT = """
import json, sys, time
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "prepare":
        print(json.dumps({"done": True}), flush=True); continue
    for name in request.get("names", ()):
        print(json.dumps({"began": name}), flush=True)
        if name == "dies": sys.exit(7)
        if name == "hangs": time.sleep(60)
        if name == "refuses":
            print(json.dumps({"error": "cannot"}), flush=True); break
        print(json.dumps({"row": name}), flush=True)
    else:
        print(json.dumps({"done": True}), flush=True)
"""


def child(tmp_path: Path) -> Child:
    return Child(tmp_path / "log", (sys.executable, "-c", SCRIPT))


def test_a_child_that_ends_or_hangs_is_said_to(tmp_path: Path) -> None:
    one = child(tmp_path)
    assert [m.get("row") for m in one.ask("x", 20, names=["a"])] == [None, "a"]
    with pytest.raises(Refused, match="cannot"):
        list(one.ask("x", 20, names=["refuses"]))
    with pytest.raises(Lost, match="status 7"):
        list(one.ask("x", 20, names=["dies"]))
    other = child(tmp_path)
    with pytest.raises(Lost, match="did not answer"):
        list(other.ask("x", 0.5, names=["hangs"]))
    other.close()


def test_who_is_nobody_s_row_is_done_without(tmp_path: Path) -> None:
    script = SCRIPT.replace(
        'for name in request.get("names", ()):',
        """if "keeper" not in request.get("without", ()):
        print(json.dumps({"began": "keeper"}), flush=True); sys.exit(1)
    for name in request.get("names", ()):""",
    )
    shift = Shift({}, 20.0, lambda: Child(tmp_path / "log", (sys.executable, "-c", script)))
    rows: list[str] = []
    failed = shift.carry_out(
        "x", "names", ["a"], lambda: 5.0, lambda m: rows.append(m.get("row")) or m.get("row")
    )  # type: ignore[func-returns-value]
    shift.close()
    assert failed == {} and "a" in rows


@pytest.mark.parametrize("names, expected", [
    (["a", "dies", "b"], {"dies": "status 7"}),
    (["dies", "a", "hangs"], {"dies": "status 7", "hangs": "did not answer"}),
    (["a", "refuses", "b"], {"refuses": "cannot", "b": "cannot"}),
])  # fmt: skip
def test_who_took_the_process_down_is_left_out_and_the_others_go_on(
    tmp_path: Path, names: list[str], expected: dict[str, str]
) -> None:
    shift = Shift({}, 20.0, lambda: child(tmp_path))
    rows: list[str] = []

    def tell(message: dict[str, Any]) -> str | None:
        if "row" in message:
            rows.append(message["row"])
        return message.get("row")

    failed = shift.carry_out("x", "names", names, lambda: 3.0, tell)
    shift.close()
    assert failed.keys() == expected.keys()
    assert all(part in failed[name] for name, part in expected.items())
    assert rows == [name for name in names if name not in expected]


# ------------------------------------------------------------------------------------ the parts


def test_an_expert_of_any_format_fills_its_slab() -> None:
    from understudy.experts.device.slab import Slab

    for format in ("stored", "int8", "int4"):
        parts = micro.packed(format, 64, 32)
        slab = Slab.of(micro.layout(parts, format), transposed=False)
        memory = torch.zeros(slab.nbytes, dtype=torch.uint8)
        slab.pack({name: (part,) for name, part in parts.items()}, memory)
        for name, (view,) in slab.views(memory).items():
            assert torch.equal(view, parts[name])


def test_parts_that_need_a_device_say_so_and_the_others_are_measured() -> None:
    said: list[dict[str, Any]] = []
    desk = Desk(said.append)
    desk.prepare("cpu")
    desk.micro(["link", "cpu", "gather"], {}, asdict(gpu.SMALL))
    found = {m["micro"]["name"]: m["micro"] for m in said if "micro" in m}
    assert found["link"]["skipped"] == found["gather"]["skipped"] == "needs an accelerator"
    assert found["cpu"]["rate"] > 0
    text = gpu._parts(list(found.values()))
    assert "link: not measured, needs an accelerator" in text


def test_memories_are_measured_by_the_device_s_clock() -> None:
    pretend = pytest.importorskip("pretend", reason="the pretended device is not here")
    device = pretend.Pretend(bandwidth=1e9, memory=64 << 20)
    sizes = gpu.SMALL
    figure = micro.one("link", device, sizes, {})
    assert figure["rate"] == pytest.approx(1e9, rel=0.2)
    assert micro.one("device", device, sizes, {})["rate"] > 0
    assert not device.pinned_bytes


# ----------------------------------------------------------------------------------- the command


def test_no_floor_is_beaten_by_what_was_measured(tmp_path: Path) -> None:
    run = gpu.Run(gpu.arguments(["--smoke", "--work", str(tmp_path)]), TimeBudget(1.0))
    assert run.rates() == Rates()
    for name, rate in (("link", 50.0), ("gather", 52.0), ("device", 3000.0), ("expert bf16", None)):
        run.figures[name] = {"name": name, "rate": rate}
    assert run.rates() == Rates(device=3000.0, link=52.0)


def test_the_pages_can_show_what_was_found() -> None:
    results = {
        "cells": [made("lru", 0.8), head("device") | {"skipped": "why", "rounds": 0}],
        "micro": [{"name": "gather", "of": "of link", "rate": 5e10, "share": 0.9, "how": "x"}],
        "targets": [target.as_dict() for target in figures.targets([made("lru", 0.8)], {}, [])],
    }
    assert "| twin:50 | lru | bit-exact | 800 |" in pages.KINDS["gpu"](results)
    assert "why" not in pages.KINDS["gpu"](results)
    assert "| gather | of link | x | 50.0 | 90 % |" in pages.KINDS["parts"](results)
    assert "| NO | 2.00 | <= 1.6 | 1.3 NO |" in pages.KINDS["targets"](results)


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for given, text in (
        (["--models", "huge"], "no model 'huge'; use twin, twin-large, qwen3"),
        (["--rows", "lruu"], "no row 'lruu'"),
        (["--budgets", "half"], "write 50,25,75,10"),
        (["--budgets", "100"], "between 0 and 100"),
        (["--trace", "nowhere.csv"], "there is no trace nowhere.csv"),
    ):
        assert gpu.main([*given, "--smoke"]) == 2
        assert text in capsys.readouterr().err


def test_without_an_accelerator_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("an accelerator is here")
    assert gpu.main([]) == 2
    assert "missing: an accelerator (torch" in capsys.readouterr().err


@pytest.mark.slow
def test_smoke(tmp_path: Path) -> None:
    """One cell of the twin on the CPU tier, end to end; qwen3 without its trace."""
    done = subprocess.run(
        [sys.executable, "bench/gpu.py", "--smoke", "--only", "twin", "--rows", "lru",
         "--work", str(tmp_path), "--output", str(tmp_path / "out.json")],
        cwd=ROOT, capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "out.json").read_text()) == last
    rows = {(r["contestant"], r["budget_fraction"]): r for r in last["cells"]}
    assert rows["lru", 0.5]["exact"] == "yes" and rows["lru", 0.5]["rounds"] == 2
    assert rows["resident", 1.0]["bytes_per_token"] == 0
    assert last["left_out"] == ["qwen3: needs the recorded routing, --trace FILE"]
    assert {t["met"] for t in last["targets"]} == {"not run"}
    assert "x floor" in done.stdout and "left out: qwen3" in done.stdout
    assert parent.COMMAND[1:] == ("-m", "bench.device.child")
