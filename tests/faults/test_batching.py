"""What goes wrong while many are answered at once: whoever was hit gets an error, whoever was not
gets the right answer, and nobody waits for ever."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.test_running import Disk, cut, integrity, overwritten, removed, replaced

from understudy.batch import Ask, Busy, CannotFit, Delta, Draining, EngineDied, Sampling
from understudy.batch.engine import BatchEngine
from understudy.batch.opening import start
from understudy.core import ReadFailed

PATIENCE = 60.0
NEW = 24
PROMPTS = tuple(tuple(range(first, first + 9)) for first in (40, 60, 80))


class Heard:
    """A sink: everything an answer brought, and when it ended."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.last: Delta | None = None
        self.begun, self._over = threading.Event(), threading.Event()
        self.act: Callable[[], object] = lambda: None  # on the engine's thread, at the 4th token

    def __call__(self, delta: Delta) -> None:
        self.tokens += delta.tokens
        self.begun.set()
        if delta.tokens and len(self.tokens) == 4:
            self.act()
        if delta.last:
            self.last = delta
            self._over.set()

    def end(self) -> Delta:
        assert self._over.wait(PATIENCE), "nobody may be left waiting"
        assert self.last is not None and self.last.report is not None
        return self.last

    @property
    def answer(self) -> list[int]:
        """The tokens of an answer that came to its end."""
        assert self.end().error is None
        assert self.end().finish == "length"
        return self.tokens


def ask(engine: BatchEngine, prompt: tuple[int, ...] = PROMPTS[0], new: int = NEW) -> Heard:
    heard = Heard()
    engine.submit(Ask(prompt, new, Sampling(temperature=0.0), ignore_eos=True), heard)
    return heard


def ask_all(engine: BatchEngine) -> list[Heard]:
    return [ask(engine, prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def expected(speaking_model: Path) -> list[list[int]]:
    """The answers when everything works and every expert is there."""
    engine = start(speaking_model, memory="1GiB", max_num_seqs=3)
    try:
        return [heard.answer for heard in ask_all(engine)]
    finally:
        engine.close()
        engine.engine.close()


@pytest.fixture
def folder(speaking_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(speaking_model, tmp_path / "model"))


@pytest.fixture
def engine(folder: Path) -> Iterator[BatchEngine]:
    opened = start(
        folder, memory="1GiB", slots=12, self_switch=False, direct_io=False, max_num_seqs=3
    )
    yield opened
    opened.close()
    opened.engine.close()


def left_nothing(engine: BatchEngine) -> None:
    """No row holds anything any more, and the book of experts is in order."""
    now = engine.snapshot()
    assert (now.running, now.waiting, now.kv_used) == (0, 0, 0)
    integrity(engine.engine.model)


# ------------------------------------------------------------------------------ files and disks


@pytest.mark.parametrize("damage", [cut, overwritten, replaced, removed])
def test_a_file_that_changes_ends_every_answer_with_an_error(
    engine: BatchEngine,
    folder: Path,
    expected: list[list[int]],
    damage: Callable[[Path], None],
) -> None:
    first = Heard()
    (weights,) = folder.glob("*.safetensors")
    first.act = lambda: damage(weights)
    engine.submit(Ask(PROMPTS[0], NEW, Sampling(temperature=0.0), ignore_eos=True), first)
    everybody = [first, *(ask(engine, prompt) for prompt in PROMPTS[1:])]
    for heard, whole in zip(everybody, expected, strict=True):
        end = heard.end()
        assert isinstance(end.error, ReadFailed)
        assert end.finish is None
        assert heard.tokens == whole[: len(heard.tokens)]  # nothing wrong was said before
        assert len(heard.tokens) < NEW
    assert isinstance(ask(engine).end().error, ReadFailed)  # and it stays so
    assert engine.snapshot().alive
    left_nothing(engine)


def test_a_disk_that_fails_for_a_while(
    engine: BatchEngine, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as m:
        m.setattr(os, "preadv", broken)
        for heard in ask_all(engine):
            assert isinstance(heard.end().error, ReadFailed)
    left_nothing(engine)
    assert [heard.answer for heard in ask_all(engine)] == expected  # the cable is back
    left_nothing(engine)


@pytest.mark.parametrize("nth", [1, 7, 40, 120])
def test_a_single_failure_hits_one_step_or_nobody(
    engine: BatchEngine, expected: list[list[int]], nth: int
) -> None:
    disk, left, turn = Disk(engine.engine.model), [nth], threading.Lock()

    def fails() -> bool:
        with turn:
            left[0] -= 1
            return left[0] == 0

    disk.fails = fails
    for heard, whole in zip(ask_all(engine), expected, strict=True):
        end = heard.end()
        if end.error is not None:
            assert isinstance(end.error, ReadFailed)
            assert heard.tokens == whole[: len(heard.tokens)]
        else:
            assert heard.answer == whole
    left_nothing(engine)
    assert [heard.answer for heard in ask_all(engine)] == expected


def test_who_waits_is_not_hit(
    folder: Path, expected: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = start(folder, memory="1GiB", slots=12, direct_io=False, max_num_seqs=1)
    try:
        disk, gate = Disk(engine.engine.model), threading.Event()
        disk.fails = lambda: gate.wait(PATIENCE) and disk.failed == 0
        hit, waiting = ask(engine), ask(engine, PROMPTS[1])
        gate.set()  # only now does the first read fail, and only that one
        assert isinstance(hit.end().error, ReadFailed)
        assert waiting.answer == expected[1]
    finally:
        engine.close()
        engine.engine.close()


# ------------------------------------------------------------------------------------- the engine


def test_the_engines_death_is_told_to_everybody(
    engine: BatchEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise RuntimeError("a bug")

    running = Heard()
    running.act = lambda: monkeypatch.setattr(engine._scheduler, "next", broken)
    engine.submit(Ask(PROMPTS[0], NEW, Sampling(temperature=0.0), ignore_eos=True), running)
    others = [ask(engine, prompt) for prompt in (*PROMPTS, *PROMPTS)]
    for heard in (running, *others):
        assert isinstance(heard.end().error, EngineDied)
    assert len(running.tokens) == 4
    now = engine.snapshot()
    assert not now.alive
    assert now.error is not None and "a bug" in now.error
    with pytest.raises(EngineDied, match="restart the server"):
        ask(engine)
    assert engine.drain(PATIENCE)  # nobody is left to wait for


def test_a_sink_that_fails_is_nobody_elses_affair(
    engine: BatchEngine, expected: list[list[int]]
) -> None:
    def broken() -> None:
        raise RuntimeError("the client's side has a bug")

    bad = Heard()
    bad.act = broken
    engine.submit(Ask(PROMPTS[0], NEW, Sampling(temperature=0.0), ignore_eos=True), bad)
    good = ask(engine, PROMPTS[1])
    assert good.answer == expected[1]
    assert bad.end().finish == "abort"
    left_nothing(engine)


def test_closing_in_the_middle_aborts(engine: BatchEngine) -> None:
    heard = [ask(engine, prompt, new=300) for prompt in PROMPTS]
    assert all(one.begun.wait(PATIENCE) for one in heard)
    engine.close()
    assert [one.end().finish for one in heard] == ["abort"] * 3
    with pytest.raises(Draining):
        ask(engine)


# ------------------------------------------------------------------------------------- the clock


@pytest.mark.parametrize("jump", [-3e8, 3e8])
def test_a_jump_of_the_clock_changes_nothing(
    engine: BatchEngine,
    expected: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
    jump: float,
) -> None:
    real = time.time
    first = Heard()
    first.act = lambda: monkeypatch.setattr(time, "time", lambda: real() + jump)
    engine.submit(Ask(PROMPTS[0], NEW, Sampling(temperature=0.0), ignore_eos=True), first)
    assert first.answer == expected[0]
    report = first.end().report
    assert report is not None
    assert 0 <= report.queue_seconds <= report.ttft_seconds <= report.e2e_seconds < PATIENCE
    endless = ask(engine, new=480)
    assert endless.begun.wait(PATIENCE)
    began = time.monotonic()
    assert not engine.drain(0.05)
    assert time.monotonic() - began < 5
    assert endless.end().finish == "abort"


# ------------------------------------------------------------------------------------ the limits


def test_what_cannot_fit_and_what_is_too_much_is_refused(engine: BatchEngine) -> None:
    with pytest.raises(CannotFit, match=f"exceed the context of {engine.context}"):
        ask(engine, new=engine.context)
    engine.max_queue = 1
    running = [ask(engine, prompt, new=200) for prompt in PROMPTS]
    waiting = ask(engine)
    with pytest.raises(Busy) as refused:
        ask(engine)
    assert refused.value.retry_after
    engine.close()
    assert {heard.end().finish for heard in (*running, waiting)} == {"abort"}
