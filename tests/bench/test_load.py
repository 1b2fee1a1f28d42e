"""What the load test makes of what it saw."""

from __future__ import annotations

import pytest
import torch

from bench.batches import Dictation, ratios
from bench.clients import COMPLETIONS, Job, _mismatch
from bench.served import Memory


def test_memory_is_compared_after_the_warm_up() -> None:
    memory = Memory()
    for second in range(101):
        memory.seconds.append(float(second))
        memory.nbytes.append(500 + 10 * min(second, 20) + (5 if second > 95 else 0))
    found = memory.summary()
    assert found["warm_up_seconds"] == 20
    assert found["first_bytes"] == 700
    assert found["last_bytes"] == 700  # the median of the last ten seconds, not the last value
    assert found["growth"] == 0
    assert found["peak_bytes"] == 705


def test_a_steady_leak_is_seen() -> None:
    memory = Memory([float(s) for s in range(101)], [1000 + s for s in range(101)])
    found = memory.summary()
    assert found["growth"] == pytest.approx(70 / 1025, rel=0.01)
    assert found["slope_bytes_per_hour"] == 3600


def test_a_mismatch_names_the_decision_it_hung_on() -> None:
    job = Job(COMPLETIONS, {"max_tokens": 3}, "one two three", ("one", " two", " three"), (1, 2, 3))
    found = _mismatch(job, "one twist", stream=True)
    assert found["first_different_character"] == 6
    assert found["gap"] == 2
    assert _mismatch(job, "one two", stream=False)["gap"] == 3  # it ended too soon


def test_dictation_leaves_one_token() -> None:
    place = Dictation([3, 1]).begin()
    for token in (3, 1, 1):  # past its end it repeats itself: somebody else counts the tokens
        scores = torch.arange(5.0)
        place.constrain(scores)
        assert int(scores.argmax()) == token
        assert int(torch.isfinite(scores).sum()) == 1
        place.accept(token)
    assert not place.complete


def test_ratios_against_batch_1() -> None:
    rows = [
        {"model": "fine", "batch": 1, "of_bound": 0.5, "tokens_per_second": 4.0},
        {"model": "fine", "batch": 8, "of_bound": 0.9, "tokens_per_second": 10.0},
    ]
    assert ratios(rows) == {
        "fine batch 1 of the byte bound": 0.5,
        "fine batch 8 of the byte bound": 0.9,
        "fine batch 8 / batch 1": 2.5,
    }
