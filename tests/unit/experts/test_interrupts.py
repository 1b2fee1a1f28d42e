"""Ctrl-C at any moment loses no slot: it is noted, and delivered at the next safe point."""

from __future__ import annotations

import _thread
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import understudy
from understudy.experts.interrupts import Deferred


def test_it_arrives_at_the_safe_point_and_not_before() -> None:
    steps = []
    with pytest.raises(KeyboardInterrupt), Deferred() as interrupts:
        signal.raise_signal(signal.SIGINT)
        steps.append("after the signal")
        interrupts.check()
        steps.append("after the check")
    assert steps == ["after the signal"]


def test_without_a_safe_point_it_arrives_at_the_end() -> None:
    with pytest.raises(KeyboardInterrupt), Deferred():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_one_is_not_held_back() -> None:
    with pytest.raises(KeyboardInterrupt), Deferred():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second Ctrl-C must get through")


def test_the_error_of_the_work_is_not_replaced() -> None:
    with pytest.raises(ValueError, match="of the work"), Deferred():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("of the work")


def test_other_threads_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with Deferred():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def test_interrupted_at_random_moments_the_book_stays_whole(
    tiny: Callable[[str, str], Path],
) -> None:
    dice = random.Random(7)
    ids = torch.arange(2, 11).unsqueeze(0)
    with understudy.load(tiny("qwen3_moe", "float32"), slots=5, self_switch=False) as model:

        def answer() -> torch.Tensor:
            out: torch.Tensor = model.generate(ids, max_new_tokens=5, do_sample=False)
            return out

        expected = answer()
        started = time.perf_counter()
        answer()
        length = time.perf_counter() - started
        runtime = model.understudy.runtime
        interrupted = 0
        for _ in range(25):
            timer = threading.Timer(dice.random() * length, _thread.interrupt_main)
            try:
                timer.start()
                answer()
                timer.join()
                time.sleep(0.001)
            except KeyboardInterrupt:
                interrupted += 1
            with runtime._lock:
                runtime.transfer.settle()
                runtime.director.book.check_integrity(idle=True)
                assert all(map(runtime.director.book.ready, runtime.director.book))
        assert interrupted > 5
        assert torch.equal(answer(), expected)
