"""What goes wrong while a model runs: an error that names the cure, and never a wrong answer."""

from __future__ import annotations

import errno
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from understudy import model as guest
from understudy.core import (
    BudgetTooSmall,
    ContextTooLong,
    ExpertId,
    ReadFailed,
    UnderstudyError,
    current_forward,
)
from understudy.engine import Engine, load
from understudy.experts.store import Chunk

NEW = 8


@pytest.fixture
def folder(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(shutil.copytree(tiny("qwen3_moe"), tmp_path / "model"))


@pytest.fixture
def weights(folder: Path) -> Path:
    return folder / "model.safetensors"


@pytest.fixture
def model(folder: Path) -> Iterator[Any]:
    with load(folder, "1GiB", slots=8, self_switch=False, direct_io=False) as opened:
        yield opened


@pytest.fixture
def prompt(tokens: Callable[..., Any]) -> dict[str, torch.Tensor]:
    batch: dict[str, torch.Tensor] = tokens(7)
    return batch


def generate(model: Any, prompt: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    with torch.inference_mode():
        out = model.generate(
            **prompt,
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
    return torch.stack(out.logits)


@pytest.fixture
def expected(tiny: Callable[..., Path], prompt: dict[str, torch.Tensor]) -> torch.Tensor:
    with load(tiny("qwen3_moe"), "1GiB", slots=32, predictor="none") as model:
        return generate(model, prompt)


def integrity(model: Any) -> None:
    runtime = model.understudy.runtime
    with runtime._lock:
        runtime.transfer.settle()
        runtime.director.book.check_integrity(idle=True)


class Saboteur:
    """A streamer: does something after some tokens."""

    def __init__(self, act: Callable[[], object], after: int = 3) -> None:
        self.act, self.left = act, after

    def put(self, value: Any) -> None:
        self.left -= 1
        if self.left == 0:
            self.act()

    def end(self) -> None:
        pass


# ------------------------------------------------------------------------------ files that change


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def overwritten(path: Path) -> None:
    size = path.stat().st_size
    with path.open("r+b") as f:
        f.write(os.urandom(size))


def replaced(path: Path) -> None:
    other = path.with_name("new")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)


def removed(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [cut, emptied, overwritten, replaced, removed])
def test_a_file_that_changes_while_running_stops_the_answer(
    model: Any,
    weights: Path,
    prompt: dict[str, torch.Tensor],
    damage: Callable[[Path], None],
) -> None:
    with pytest.raises(ReadFailed, match=r"model\.safetensors") as error:
        generate(model, prompt, streamer=Saboteur(lambda: damage(weights)))
    assert "\n" not in str(error.value)
    integrity(model)
    with pytest.raises(ReadFailed):  # and it stays so
        generate(model, prompt)
    integrity(model)


def test_experts_that_are_resident_do_not_need_the_file(
    folder: Path, weights: Path, prompt: dict[str, torch.Tensor], expected: torch.Tensor
) -> None:
    with load(folder, "1GiB", slots=32) as model:
        assert torch.equal(generate(model, prompt), expected)
        removed(weights)
        assert torch.equal(generate(model, prompt), expected)


# ------------------------------------------------------------------------------ disks that fail


class Disk:
    """The real disk of a model, whose reads fail when the test says so."""

    def __init__(self, model: Any) -> None:
        self.source = model.understudy.runtime.transfer.source
        self.honest = self.source.read
        self.source.read = self.read
        self.fails: Callable[[], bool] = lambda: False
        self.failed = 0

    def read(self, chunk: Chunk) -> None:
        if self.fails():
            self.failed += 1
            raise ReadFailed("the disk of the test failed; repair the test")
        self.honest(chunk)


def test_a_read_error_names_the_file_and_passes(
    model: Any,
    prompt: dict[str, torch.Tensor],
    expected: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as m:
        m.setattr(os, "preadv", broken)
        with pytest.raises(ReadFailed, match=r"model\.safetensors: .*Input/output error") as error:
            generate(model, prompt)
        integrity(model)
    assert "\n" not in str(error.value)
    assert isinstance(error.value.__cause__, OSError)
    assert torch.equal(generate(model, prompt), expected)  # the cable is back


@pytest.mark.parametrize("nth", [1, 2, 9, 25])
def test_any_single_failure_is_reported_or_harmless_and_then_over(
    model: Any, prompt: dict[str, torch.Tensor], expected: torch.Tensor, nth: int
) -> None:
    disk = Disk(model)
    left, turn = [nth], threading.Lock()

    def fails() -> bool:
        with turn:
            left[0] -= 1
            return left[0] == 0

    disk.fails = fails
    try:
        assert torch.equal(generate(model, prompt), expected)  # it hit a speculation
    except ReadFailed:
        integrity(model)
    assert disk.failed == 1
    assert torch.equal(generate(model, prompt), expected)


class Patient:
    """A seam that lets all speculation come to its end before the next event."""

    def __init__(self, model: Any) -> None:
        self.runtime = model.understudy.runtime
        for module in guest.guests(model):
            module.seam = self

    def __call__(self, *args: Any) -> torch.Tensor:
        queue, lock = self.runtime.transfer, self.runtime._lock
        patience = time.monotonic() + 10
        with lock:
            while queue._guesses or queue._jobs:
                assert time.monotonic() < patience
                queue.landed.wait(0.05)
        found: torch.Tensor = self.runtime(*args)
        return found


def test_failing_speculation_disturbs_nobody(
    model: Any, prompt: dict[str, torch.Tensor], expected: torch.Tensor
) -> None:
    Patient(model)
    source = model.understudy.runtime.transfer.source
    chunks, read, failed = source.chunks, source.read, []

    def mark(expert: ExpertId, slot: int, block: int) -> list[Chunk]:
        slot_of = model.understudy.runtime.director.book.slot(expert)
        nowhere = slot_of.unused  # brought by speculation
        return [c._replace(file=-1) if nowhere else c for c in chunks(expert, slot, block)]

    def refuse(chunk: Chunk) -> None:
        if chunk.file == -1:
            failed.append(chunk)
            raise ReadFailed("speculation finds no disk")
        read(chunk)

    source.chunks, source.read = mark, refuse
    assert torch.equal(generate(model, prompt), expected)
    integrity(model)
    counted = model.understudy.counters
    assert counted.prefetch_issued == len(failed) > 0
    assert (counted.prefetch_used, counted.late) == (0, 0)


# ------------------------------------------------------------------------------------- Ctrl-C


def interrupt() -> None:
    raise KeyboardInterrupt


def recovers(model: Any, prompt: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
    integrity(model)
    assert current_forward.get() is None
    assert torch.equal(generate(model, prompt), expected)
    integrity(model)


@pytest.mark.parametrize("after", [1, 2, 5])
def test_interrupted_between_tokens(
    model: Any, prompt: dict[str, torch.Tensor], expected: torch.Tensor, after: int
) -> None:
    with pytest.raises(KeyboardInterrupt):
        generate(model, prompt, streamer=Saboteur(interrupt, after))
    recovers(model, prompt, expected)


@pytest.mark.parametrize("nth", [1, 2, 7, 20])
def test_interrupted_while_it_waits_for_an_expert(
    model: Any, prompt: dict[str, torch.Tensor], expected: torch.Tensor, nth: int
) -> None:
    queue, disk = model.understudy.runtime.transfer, Disk(model)
    disk.fails = lambda: bool(time.sleep(0.001))  # slow enough to be waited for
    wait, calls = queue.wait, []

    def interrupted(timeout: float | None = None) -> bool:
        calls.append(timeout)
        if len(calls) == nth:
            interrupt()
        return bool(wait(timeout))

    queue.wait = interrupted
    with pytest.raises(KeyboardInterrupt):
        generate(model, prompt)
    recovers(model, prompt, expected)


def test_what_was_under_way_at_the_interrupt_may_fail_unheard(
    model: Any, prompt: dict[str, torch.Tensor], expected: torch.Tensor
) -> None:
    disk, queue = Disk(model), model.understudy.runtime.transfer
    wait, held = queue.wait, threading.Event()

    def doomed() -> bool:
        assert held.wait(10)
        return True

    def interrupted(timeout: float | None = None) -> bool:
        queue.wait = wait
        raise KeyboardInterrupt

    disk.fails, queue.wait = doomed, interrupted
    with pytest.raises(KeyboardInterrupt):
        generate(model, prompt)
    held.set()  # only now do its reads fail
    integrity(model)
    assert disk.failed > 0
    disk.fails = lambda: False
    recovers(model, prompt, expected)


# ------------------------------------------------------------------------------------ limits


def refused(folder: Path) -> BudgetTooSmall:
    with pytest.raises(BudgetTooSmall) as error:
        load(folder, 1000, max_context=64)
    assert "\n" not in str(error.value)
    return error.value


def test_the_size_in_a_too_small_budget_works_when_typed_back(
    folder: Path, prompt: dict[str, torch.Tensor], expected: torch.Tensor
) -> None:
    typed = re.search(r"--memory (\S+)", str(refused(folder)))
    assert typed
    with load(folder, typed[1], max_context=64) as model:
        assert torch.equal(generate(model, prompt), expected)


def test_the_smallest_budget_is_two_experts_and_not_a_byte_less(
    folder: Path, prompt: dict[str, torch.Tensor], expected: torch.Tensor
) -> None:
    smallest = refused(folder).smallest_bytes
    with pytest.raises(BudgetTooSmall):
        load(folder, smallest - 1, max_context=64)
    with load(folder, smallest, max_context=64) as model:
        assert model.understudy.plan.slots == 2
        assert torch.equal(generate(model, prompt), expected)


def test_a_context_the_model_was_not_made_for(folder: Path) -> None:
    with pytest.raises(ContextTooLong, match="1 to 256 tokens") as error:
        load(folder, "1GiB", max_context=257)
    assert "\n" not in str(error.value)
    with load(folder, "1GiB", max_context=256) as model:
        assert model.understudy.plan.context == 256


def test_a_prompt_that_leaves_no_room_for_the_answer(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(96)}, unk_token="t3"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t3").save_pretrained(folder)
    with Engine(folder, memory="1GiB", max_context=20) as engine:
        with pytest.raises(ContextTooLong, match="15 prompt tokens and 6 new ones") as error:
            engine.generate([5] * 15, max_new_tokens=6)
        assert "\n" not in str(error.value)
        assert len(engine.generate([5] * 15, max_new_tokens=5).tokens) == 5


# ------------------------------------------------------------------------------------- the end


def test_closed_in_the_middle_of_an_answer(model: Any, prompt: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UnderstudyError, match="closed"):
        generate(model, prompt, streamer=Saboteur(model.understudy.close))


def test_closed_by_another_thread_while_it_waits(
    model: Any, prompt: dict[str, torch.Tensor]
) -> None:
    disk, stuck, go = Disk(model), threading.Event(), threading.Event()

    def hang() -> bool:
        stuck.set()
        return not go.wait(10)

    disk.fails = hang
    told: list[BaseException] = []

    def work() -> None:
        try:
            generate(model, prompt)
        except UnderstudyError as e:
            told.append(e)

    worker = threading.Thread(target=work)
    worker.start()
    assert stuck.wait(10)
    closer = threading.Thread(target=model.understudy.close)
    closer.start()
    worker.join(10)  # it need not wait for the disk
    assert not worker.is_alive()
    go.set()
    closer.join(10)
    assert not closer.is_alive()
    assert "closed" in str(told[0])


def test_generation_past_the_planned_context(folder: Path, prompt: dict[str, torch.Tensor]) -> None:
    with load(folder, "1GiB", max_context=12) as model:
        with pytest.raises(ContextTooLong, match="12"):
            model.generate(**prompt, max_new_tokens=40, do_sample=False)
        model.understudy.runtime.director.book.check_integrity(idle=True)
