"""The protocol between a benchmark and its contestants, limits that hold, files that are cold."""

from __future__ import annotations

import os

import pytest

from bench import page_cache
from bench.contestants import CannotRun
from bench.memory_limit import MemoryLimit, why_not
from bench.process import Process
from bench.runner import step_through

FAKES = "tests.bench.fakes:"
needs_limits = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


def test_a_contestant_loads_and_plays_rounds() -> None:
    with Process("counting", FAKES + "Counting") as process:
        facts = process.ask("load", model="m", memory=7, options={})
        lap = process.ask("round", prompt=[1, 2], answer=[5, 6, 9], seconds=60)
    assert facts["said"] == ["m with 7"]
    assert lap["steps"] == 2
    assert lap["guesses"] == [3, 6, 7]  # after the prompt, after 5, after 6: the text is dictated
    assert lap["rss_bytes"] > 0


def test_a_slow_contestant_stops_when_its_time_is_over() -> None:
    lap = step_through(lambda tokens: 0, lambda token: 0, [1], [1] * 100, seconds=-1.0)
    assert lap.steps == 2


def test_what_goes_wrong_comes_back_as_one_line() -> None:
    with Process("failing", FAKES + "Failing") as process:
        process.ask("load", model="m", memory=None, options={})
        with pytest.raises(CannotRun, match="ValueError: no such token"):
            process.ask("round", prompt=[1], answer=[1], seconds=1)
        assert process.ask("close")["rss_bytes"] > 0


def test_a_contestant_that_cannot_be_imported_is_a_reason_not_a_crash() -> None:
    with (
        Process("nobody", "tests.bench.no_such_file:Nobody") as process,
        pytest.raises(CannotRun, match="no_such_file"),
    ):
        process.ask("load", model="m", memory=None, options={})


@needs_limits
def test_the_kernel_enforces_the_limit() -> None:
    with Process("greedy", FAKES + "Greedy", limit=128 << 20) as process:
        process.ask("load", model="m", memory=None, options={})
        with pytest.raises(CannotRun, match="more memory than the limit"):
            process.ask("round", prompt=[1], answer=[1], seconds=1)


@needs_limits
def test_the_page_cache_counts_too_and_the_group_goes_away(tmp_path) -> None:
    file = tmp_path / "large"
    file.write_bytes(os.urandom(1 << 20) * 64)
    page_cache.forget([file])
    limit = MemoryLimit("reader", 32 << 20)
    child = os.fork()
    if child == 0:
        limit.add(os.getpid())
        with file.open("rb", buffering=0) as opened:
            while opened.read(1 << 20):
                pass
        os._exit(0)
    os.waitpid(child, 0)
    assert (16 << 20) < limit.peak <= (32 << 20)
    limit.close()
    assert not limit.folder.exists()


def test_a_file_is_warm_when_read_and_cold_when_forgotten(tmp_path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(4 << 20))
    file.read_bytes()
    if page_cache.held_share([file]) < 0.99:
        pytest.skip("this file system does not keep files in the page cache")
    assert page_cache.forget([file]) < 0.01
