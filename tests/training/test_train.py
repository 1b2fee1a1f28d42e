"""A run can be stopped and continued without a trace, and its schedule ends in time."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch

from training import data, moe, train

SHAPE = moe.Shape(
    "qwen3_moe", layers=2, experts=4, top_k=2, width=16, hidden=32, heads=2, kv_heads=1,
    head_dim=16, vocabulary=64, context=24,
)  # fmt: skip
RECIPE = train.Recipe(rows=4, warmup=2)


@pytest.fixture
def batches(tmp_path: Path) -> train.Batches:
    rng = np.random.default_rng(0)
    for domain in data.DOMAINS:
        rng.integers(64, size=2000).astype(np.uint16).tofile(tmp_path / f"{domain}.train.u16")
    rng.integers(2, size=2000).astype(np.uint8).tofile(tmp_path / "tasks.train.answers.u8")
    return train.Batches(tmp_path, RECIPE, SHAPE.context)


def _steps(run: train.Run, batches: train.Batches, until: int) -> list[float]:
    return [run.train_step(batches[run.step], 0.1)["loss"] for _ in range(run.step, until)]


def test_continued_run_is_the_same_run(batches: train.Batches, tmp_path: Path) -> None:
    whole = train.Run(SHAPE, RECIPE, tmp_path / "whole.pt", compiled=False)
    losses = _steps(whole, batches, 6)
    first = train.Run(SHAPE, RECIPE, tmp_path / "parts.pt", compiled=False)
    begun = _steps(first, batches, 3)
    first.used = 12.5
    first.save()
    second = train.Run(SHAPE, RECIPE, tmp_path / "parts.pt", compiled=False)
    assert (second.step, second.used) == (3, 12.5)
    assert begun + _steps(second, batches, 6) == losses
    assert torch.equal(whole.optimizer.master, second.optimizer.master)


def test_training_lowers_the_loss(batches: train.Batches, tmp_path: Path) -> None:
    run = train.Run(SHAPE, RECIPE, tmp_path / "run.pt", compiled=False)
    batch = batches[0]
    losses = [run.train_step(batch, 0.0)["loss"] for _ in range(40)]
    assert losses[-1] < 0.8 * losses[0]


def test_loss_weights(batches: train.Batches) -> None:
    inputs, targets, weight = batches[3]
    assert inputs.shape == targets.shape == weight.shape == (RECIPE.rows, SHAPE.context)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert float(weight.sum()) == pytest.approx(1.0)


def test_train_ends_by_the_clock_and_saves(batches: train.Batches, tmp_path: Path) -> None:
    run = train.Run(SHAPE, RECIPE, tmp_path / "run.pt", compiled=False)
    assert train.train(run, train.Clock(minutes=0.02, until=None), batches)
    assert run.used >= 1.2
    assert (tmp_path / "run.pt").exists()


def test_a_pause_does_not_use_up_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = train.Clock(minutes=1, until=None)
    for pause in (1, 1, 600, 1):
        now += pause
        clock.tick()
    assert clock.used == pytest.approx(7)  # the long step counts as four
    assert clock.progress == pytest.approx(7 / 60)


def test_until_ends_the_run_whatever_was_used(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    clock = train.Clock(minutes=100, until=1060.0, used=60.0)
    assert clock.progress == pytest.approx(0.5)
    now = 1060.0
    assert clock.progress == 1.0


def test_rate_warms_up_and_ends_at_zero() -> None:
    recipe = train.Recipe(rate=1.0, warmup=10)
    assert train.rate_now(recipe, 0, 0.0) == pytest.approx(0.1)
    assert train.rate_now(recipe, 100, 0.5) == pytest.approx(0.5)
    assert train.rate_now(recipe, 100, 1.0) == 0.0
