"""Budgets with answers known by hand, machines made of text, and one real disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from understudy import plan
from understudy.core import BudgetTooSmall, UnderstudyError
from understudy.plan import GIB, KIB, MIB, Plan, fit, parse_memory

# ------------------------------------------------------------------------------ sizes, as written


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("8GiB", 8 << 30),
        ("512MiB", 512 << 20),
        ("1.5GB", 1_500_000_000),
        ("1.5 gib", 3 << 29),
        ("8G", 8 << 30),
        ("64k", 64 << 10),
        ("100", 100),
        ("100B", 100),
        (12345, 12345),
        ("50%", 500),
        ("12.5%", 125),
        ("200 %", 2000),
        (" 3KB ", 3000),
    ],
)
def test_sizes_are_read_as_written(text: str | int, nbytes: int) -> None:
    assert parse_memory(text, checkpoint_bytes=1000) == nbytes


@pytest.mark.parametrize(
    "text", ["", "lots", "8 Gi B", "-3GiB", "1e9", "GiB", "8XiB", "1,5GB", "%"]
)
def test_nonsense_is_a_one_line_error_that_shows_what_works(text: str) -> None:
    with pytest.raises(UnderstudyError, match="8GiB") as error:
        parse_memory(text, checkpoint_bytes=1000)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["0", "0%", 0, -5])
def test_nothing_is_not_a_budget(text: str | int) -> None:
    with pytest.raises(UnderstudyError, match="not more than nothing"):
        parse_memory(text, checkpoint_bytes=1000)


def test_auto_leaves_a_reserve() -> None:
    assert parse_memory("auto", 1, free=lambda: 2 * GIB) == 2 * GIB - 700 * MIB
    assert parse_memory("AUTO", 1, free=lambda: 100 * GIB) == 90 * GIB
    assert parse_memory("auto", 1, free=lambda: 10 * MIB) == 0  # `fit` then says what would do


@pytest.mark.parametrize("nbytes", [1, MIB - 1, MIB, MIB + 1, 212 * MIB, GIB - 1, GIB, 3 * GIB + 5])
def test_a_typed_size_is_never_less_than_what_it_stands_for(nbytes: int) -> None:
    typed = parse_memory(plan.typed_size(nbytes), 0)
    assert nbytes <= typed < nbytes + MIB


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1536, "1.5 KiB"),
        (12 * MIB, "12 MiB"),
        (1.25 * GIB, "1.2 GiB"),
        (1000 * MIB, "1000 MiB"),
    ],
)
def test_shown_sizes(nbytes: float, text: str) -> None:
    assert plan.shown_size(nbytes) == text


# -------------------------------------------------------------------------------------- the plan


def planned(total: int, **changes: int | None) -> Plan:
    """dense 10, KV 5, activations 3, staging 2: 20 MiB before the first slot of 4 MiB."""
    sizes: dict[str, int] = {
        "dense": 10 * MIB,
        "kv": 5 * MIB,
        "activations": 3 * MIB,
        "staging": 2 * MIB,
        "slot_bytes": 4 * MIB,
    }
    return fit(
        total,
        **sizes,
        experts=64,
        context=4096,
        expert_bytes=4 * MIB - 4 * KIB,
        name="tiny",
        **changes,  # type: ignore[arg-type]
    )


def test_what_is_left_becomes_slots() -> None:
    assert planned(60 * MIB).slots == 10
    assert planned(64 * MIB - 1).slots == 10
    assert planned(64 * MIB).slots == 11


def test_there_are_never_more_slots_than_experts() -> None:
    roomy = planned(10 * GIB)
    assert roomy.slots == 64
    assert roomy.used == (20 + 64 * 4) * MIB < roomy.total


def test_two_slots_are_the_minimum_and_the_error_says_what_would_do() -> None:
    assert planned(28 * MIB).slots == 2
    with pytest.raises(BudgetTooSmall) as error:
        planned(28 * MIB - 1)
    assert error.value.smallest_bytes == 28 * MIB
    assert str(error.value) == (
        "memory 27MiB is too small for tiny: 28MiB is the smallest that works (dense 10 MiB, "
        "KV 5 MiB for 4096 tokens, buffers 5 MiB, two experts 8 MiB); "
        "try --memory 28MiB or a smaller --max-context"
    )


@pytest.mark.parametrize("slot_bytes", [4096, 3 * MIB + 12288, 47 * MIB + 1])
def test_the_smallest_number_printed_works_when_typed_back(slot_bytes: int) -> None:
    def attempt(total: int) -> Plan:
        return fit(
            total,
            dense=123_457,
            kv=99,
            activations=1,
            slot_bytes=slot_bytes,
            experts=64,
            context=10,
        )

    with pytest.raises(BudgetTooSmall) as error:
        attempt(1)
    typed = str(error.value).split("--memory ")[1].split()[0]
    assert attempt(parse_memory(typed, 0)).slots >= 2
    assert attempt(error.value.smallest_bytes).slots == 2


def test_a_number_of_slots_can_be_asked_for() -> None:
    assert planned(10 * GIB, slots=2).slots == 2
    assert planned(10 * GIB, slots=1000).slots == 64
    with pytest.raises(BudgetTooSmall, match="12 experts 48 MiB"):
        planned(60 * MIB, slots=12)


def test_one_lonely_expert_needs_one_slot() -> None:
    lonely = fit(10, dense=1, kv=1, activations=1, slot_bytes=7, experts=1, context=1)
    assert lonely.slots == 1


def test_the_line_says_it_all() -> None:
    assert planned(124 * MIB).line() == (
        "plan: 26 of 64 experts resident (41 %), dense 10 MiB, KV 5 MiB for 4096 tokens, "
        "124 MiB of 124 MiB used"
    )
    assert planned(124 * MIB).expecting(41.7).line().endswith(", expected about 42 tokens/s")
    assert planned(124 * MIB).expecting(0.123).line().endswith(", expected about 0.12 tokens/s")


def test_a_plan_is_plain_numbers() -> None:
    numbers = planned(60 * MIB).as_dict()
    assert numbers["slots"] == 10
    assert numbers["used"] == 60 * MIB
    assert set(numbers) == {f.name for f in dataclasses.fields(Plan)} | {"used"}


def test_expectation_is_the_slower_of_link_and_memory_plus_the_frame() -> None:
    half = fit(
        200,
        dense=100,
        kv=0,
        activations=0,
        slot_bytes=10,
        experts=20,
        context=1,
    )
    assert half.slots == 10
    frame = 4 * plan.FRAME_SECONDS_PER_LAYER
    # 4 layers x top-2 x 10 bytes = 80 bytes touched, half of them missing: 40 bytes at 20 bytes/s.
    link_bound = plan.expected_tokens_per_second(half, layers=4, top_k=2, bandwidth=20.0)
    assert link_bound == pytest.approx(1 / (2.0 + frame))
    # 180 bytes at 30 bytes/s take six seconds: longer than the link's two.
    memory_bound = plan.expected_tokens_per_second(half, 4, 2, 20.0, memory_bandwidth=30.0)
    assert memory_bound == pytest.approx(1 / (6.0 + frame))


def test_the_recommendation_holds_two_tokens_and_half_the_experts() -> None:
    assert plan.recommended_bytes(100, 10, experts=64, layers=8, top_k=2) == 100 + 10 * 32
    assert plan.recommended_bytes(100, 10, experts=64, layers=8, top_k=3) == 100 + 10 * 48
    assert plan.recommended_bytes(100, 10, experts=64, layers=8, top_k=8) == 100 + 10 * 64


# ----------------------------------------------------------------------------- what memory is free

MEMINFO = "MemTotal:       24684084 kB\nMemFree:  1000 kB\nMemAvailable:   10240 kB\n"


def machine(files: dict[str, str]) -> Callable[[str], str | None]:
    return {"/proc/meminfo": MEMINFO, **files}.get


def test_without_a_cgroup_the_machine_decides() -> None:
    assert plan.free_memory(machine({})) == 10 * MIB


def test_cgroup_v2_counts_page_cache_as_free_and_obeys_its_parents() -> None:
    files = {
        "/proc/self/cgroup": "0::/user/job\n",
        "/sys/fs/cgroup/user/job/memory.max": "max\n",
        "/sys/fs/cgroup/user/job/memory.current": f"{5 * MIB}\n",
        "/sys/fs/cgroup/user/memory.max": f"{6 * MIB}\n",
        "/sys/fs/cgroup/user/memory.current": f"{5 * MIB}\n",
        "/sys/fs/cgroup/user/memory.stat": f"anon 1\ninactive_file {MIB}\nactive_file {2 * MIB}\n",
    }
    assert plan.free_memory(machine(files)) == 4 * MIB


def test_cgroup_v1_reads_the_memory_controller_only() -> None:
    folder = "/sys/fs/cgroup/memory/a/b"
    files = {
        "/proc/self/cgroup": "8:pids:/x\n4:memory:/a/b\n0::/\n",
        f"{folder}/memory.limit_in_bytes": f"{8 * MIB}\n",
        f"{folder}/memory.usage_in_bytes": f"{7 * MIB}\n",
        f"{folder}/memory.stat": f"inactive_file 9\ntotal_inactive_file {MIB}\n"
        f"total_active_file {MIB // 2}\n",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes": f"{20 * MIB}\n",
    }
    assert plan.free_memory(machine(files)) == MIB + MIB + MIB // 2


def test_in_a_container_the_limit_stands_at_the_mount() -> None:
    files = {
        "/proc/self/cgroup": "0::/../docker/0123\n",
        "/sys/fs/cgroup/memory.max": f"{3 * MIB}",
        "/sys/fs/cgroup/memory.current": f"{1 * MIB}",
    }
    assert plan.free_memory(machine(files)) == 2 * MIB


def test_a_full_cgroup_has_nothing_rather_than_less() -> None:
    files = {
        "/proc/self/cgroup": "0::/a",
        "/sys/fs/cgroup/a/memory.max": "100",
        "/sys/fs/cgroup/a/memory.current": "150",
    }
    assert plan.free_memory(machine(files)) == 0


def test_a_limit_is_told_where_it_is_less_than_the_machine() -> None:
    assert plan.total_memory(machine({})) == 24684084 * 1024
    assert plan.memory_limit(machine({})) is None
    folder = "/sys/fs/cgroup/a"
    files = {
        "/proc/self/cgroup": "0::/a/b",
        f"{folder}/b/memory.max": f"{8 * GIB}",
        f"{folder}/b/memory.current": "0",
        f"{folder}/memory.max": f"{6 * GIB}",
        f"{folder}/memory.current": "0",
    }
    assert plan.memory_limit(machine(files)) == 6 * GIB
    unlimited = {**files, f"{folder}/b/memory.max": "max", f"{folder}/memory.max": f"{1 << 62}"}
    assert plan.memory_limit(machine(unlimited)) is None


def test_this_machine_has_some() -> None:
    assert 0 < plan.free_memory() <= plan.total_memory()


# ------------------------------------------------------------------------- how fast this machine is


@pytest.fixture
def file_on_disk(tmp_path: Path) -> Path:
    path = tmp_path / "shard"
    path.write_bytes(bytes(range(256)) * 4 * 4096)
    return path


@pytest.mark.parametrize("threads", [1, 3])
def test_bandwidth_of_a_buffered_file(file_on_disk: Path, threads: int) -> None:
    speed = plan.disk_bandwidth(file_on_disk, threads, 64 * KIB, 2 * MIB, direct=False)
    assert speed is not None
    assert speed > 0


def test_direct_bandwidth_is_measured_exactly_where_direct_reads_work(file_on_disk: Path) -> None:
    speed = plan.disk_bandwidth(file_on_disk, 2, 64 * KIB, MIB)
    assert (speed is not None) == plan.direct_io_works(file_on_disk)


def test_what_cannot_be_measured_is_none(tmp_path: Path, file_on_disk: Path) -> None:
    assert plan.disk_bandwidth(tmp_path / "no", 1, MIB, MIB) is None
    assert plan.disk_bandwidth(file_on_disk, 1, 64 * MIB, 64 * MIB, direct=False) is None
    assert not plan.direct_io_works(tmp_path / "no")


@pytest.mark.parametrize("blocks", [1, 2, 7, 24, 60])
def test_reads_leap_over_the_file_and_meet_each_block_once(blocks: int) -> None:
    assert sorted(plan._spread(blocks, blocks)) == list(range(blocks))
    assert len(plan._spread(blocks, 3 * blocks)) == 3 * blocks


def test_memory_is_read_at_a_finite_speed() -> None:
    assert 1e8 < plan.memory_bandwidth(8 * MIB, repeats=1) < 1e13


@pytest.mark.parametrize(
    ("total", "vocabulary", "sequences", "positions"),
    [(8 << 30, 4096, 32, 2048), (96 << 20, 4096, 32, 128), (8 << 30, 150_000, 32, 55),
     (1 << 30, 150_000, 64, 64), (50 << 20, 4096, 1, 66), (1 << 30, 0, 8, 1)],
)  # fmt: skip
def test_logits_of_a_prompt_take_a_small_part_of_the_budget(
    total: int, vocabulary: int, sequences: int, positions: int
) -> None:
    assert plan.scored_positions(total, vocabulary, sequences) == positions
