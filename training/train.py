"""Trains a reference MoE within a bounded time, and can be stopped and continued at any moment.

Knows the schedule (driven by time, not by steps: it ends when it must, whatever else the machine
does), the optimizer, checkpoints and the log. Does not know the model's arithmetic (`moe`), where
text comes from (`data`) or how good the result is (`report`).
"""

import argparse
import dataclasses
import datetime
import json
import math
import os
import signal
import time
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from training import data, export, moe, tokenizer

SHAPES = {
    "fine": moe.Shape("qwen3_moe", layers=10, experts=32, top_k=4, width=96),
    # The sizes of `models/coarse` as it was first trained, with another balance loss.
    "coarse": moe.Shape(
        "mixtral", layers=8, experts=8, top_k=2, width=512, heads=8, kv_heads=4, head_dim=32,
        eps=1e-5,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything about a run but its shape and its time."""

    rows: int = 16
    rate: float = 2e-3
    warmup: int = 150
    balance: float = 0.1
    decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    answer_weight: float = 2.0
    seed: int = 0


# --- batches ---------------------------------------------------------------------------------

Batch = tuple[Tensor, Tensor, Tensor]
"""Inputs, targets, loss weights that add up to one."""


class Batches:
    """Batch number n is always the same batch, so a continued run sees what it would have seen."""

    def __init__(self, work: Path, recipe: Recipe, length: int) -> None:
        self.recipe, self.length = recipe, length
        self.tokens = {name: _tokens(work, name, "train") for name in data.DOMAINS}
        self.answers = np.fromfile(work / "tasks.train.answers.u8", dtype=np.uint8)
        self.starts = {
            name: np.concatenate([[0], np.flatnonzero(self.tokens[name] == 0) + 1])
            for name in data.ALIGNED
        }

    def __getitem__(self, number: int) -> Batch:
        rng = np.random.default_rng((self.recipe.seed, number))
        shares = [data.MIX[name] for name in data.DOMAINS]
        names = rng.choice(len(data.DOMAINS), size=self.recipe.rows, p=shares)
        rows, weights = [], []
        for name in (data.DOMAINS[index] for index in names):
            begin = self._begin(name, rng)
            window = slice(begin, begin + self.length + 1)
            rows.append(self.tokens[name][window].astype(np.int64))
            weights.append(self._weight(name, window))
        tokens = torch.from_numpy(np.stack(rows))
        weight = torch.from_numpy(np.stack(weights))
        return tokens[:, :-1], tokens[:, 1:], weight / weight.sum()

    def _begin(self, name: str, rng: np.random.Generator) -> int:
        last = len(self.tokens[name]) - self.length - 1
        if name not in self.starts:
            return int(rng.integers(last))
        return min(int(rng.choice(self.starts[name])), last)

    def _weight(self, name: str, window: slice) -> np.ndarray:
        """Text counts fully; of a problem only the answer counts, its question is chance."""
        if name != "tasks":
            return np.ones(self.length, dtype=np.float32)
        return self.recipe.answer_weight * self.answers[window][1:].astype(np.float32)


def _tokens(work: Path, domain: str, side: str) -> data.Tokens:
    return np.fromfile(work / f"{domain}.{side}.u16", dtype=np.uint16)


# --- time ------------------------------------------------------------------------------------


class Clock:
    """How much of the allowed time is used.

    Counts the time of steps, each at most a few times the usual one, so that a process that was
    stopped (SIGSTOP) for a while does not lose its share; `until` is a moment that counts anyway.
    """

    def __init__(self, minutes: float, until: float | None, used: float = 0.0) -> None:
        self.allowed, self.until, self.used = 60 * minutes, until, used
        self.usual: float | None = None
        self.last = time.monotonic()

    def tick(self) -> float:
        """One more step is done; returns the seconds it counts."""
        now = time.monotonic()
        step, self.last = now - self.last, now
        if self.usual is None:
            self.usual = step
        counted = min(step, 4 * self.usual)
        self.usual = 0.9 * self.usual + 0.1 * counted
        self.used += counted
        return counted

    @property
    def progress(self) -> float:
        """From 0 to 1; 1 means stop."""
        left = self.allowed - self.used
        if self.until is not None:
            left = min(left, self.until - time.time())
        return 1.0 if left <= 0 else self.used / (self.used + left)


def parse_until(text: str) -> float:
    """The next moment (UTC) at which a clock shows HH:MM, in seconds since the epoch."""
    now = datetime.datetime.now(datetime.UTC)
    hour, minute = map(int, text.split(":"))
    moment = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return (moment + datetime.timedelta(days=moment <= now)).timestamp()


def rate_now(recipe: Recipe, step: int, progress: float) -> float:
    """Warm-up by steps, then a cosine of the used share of the time, down to zero."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return recipe.rate * min(1.0, (step + 1) / recipe.warmup) * cosine


# --- the optimizer ---------------------------------------------------------------------------


def _adamw(
    grad: Tensor, master: Tensor, mean: Tensor, square: Tensor, weight: Tensor, numbers: Tensor
) -> None:
    """One pass over memory: gradient in, bf16 weights out."""
    rate, scale, beta1, beta2, fix1, fix2, decay = numbers.unbind()
    wide = grad.float() * scale
    new_mean = mean * beta1 + wide * (1 - beta1)
    new_square = square * beta2 + wide * wide * (1 - beta2)
    update = new_mean / fix1 / ((new_square / fix2).sqrt() + 1e-8)
    new_master = master - rate * (update + decay * master)
    mean.copy_(new_mean)
    square.copy_(new_square)
    master.copy_(new_master)
    weight.copy_(new_master.to(weight.dtype))


def _norm(grad: Tensor) -> Tensor:
    return grad.float().pow(2).sum()


class AdamW:
    """fp32 master weights and moments behind the model's flat bf16 weights."""

    def __init__(self, parameters: moe.Parameters, recipe: Recipe, compiled: bool) -> None:
        self.parameters, self.recipe = parameters, recipe
        self.master = parameters.flat.detach().float().clone()
        self.mean = torch.zeros_like(self.master)
        self.square = torch.zeros_like(self.master)
        self.update = torch.compile(_adamw, dynamic=False) if compiled else _adamw
        self.norm = torch.compile(_norm, dynamic=False) if compiled else _norm

    @torch.no_grad()
    def step(self, number: int, rate: float) -> float:
        """Update the weights; returns the gradient's norm before clipping."""
        recipe, cut = self.recipe, self.parameters.matrices
        norm = math.sqrt(float(self.norm(self.parameters.flat_grad)))
        scale = min(1.0, recipe.clip / (norm + 1e-6))
        fixes = (1 - recipe.beta1 ** (number + 1), 1 - recipe.beta2 ** (number + 1))
        for part, decay in ((slice(0, cut), recipe.decay), (slice(cut, None), 0.0)):
            numbers = torch.tensor([rate, scale, recipe.beta1, recipe.beta2, *fixes, decay])
            self.update(
                self.parameters.flat_grad[part], self.master[part], self.mean[part],
                self.square[part], self.parameters.flat[part], numbers,
            )  # fmt: skip
        return norm


# --- the run ---------------------------------------------------------------------------------


class Run:
    """Model and optimizer, and the checkpoint in which they survive."""

    def __init__(self, shape: moe.Shape, recipe: Recipe, path: Path, compiled: bool = True) -> None:
        self.recipe, self.path = recipe, path
        self.step, self.used = 0, 0.0
        self.model = moe.Model(shape, compiled=compiled)
        self.optimizer = AdamW(self.model.parameters, recipe, compiled)
        if path.exists():
            self._restore()
        else:
            moe.initialize(shape, self.optimizer.master, recipe.seed)
        with torch.no_grad():
            self.model.parameters.flat.copy_(self.optimizer.master)

    def _restore(self) -> None:
        saved = torch.load(self.path, weights_only=True)
        self.step, self.used = int(saved["step"]), float(saved["used"])
        for name in ("master", "mean", "square"):
            getattr(self.optimizer, name).copy_(saved[name])

    def save(self) -> None:
        """Write everything needed to continue, then put it in place in one move."""
        parts = {name: getattr(self.optimizer, name) for name in ("master", "mean", "square")}
        numbers = {"step": torch.tensor(self.step), "used": torch.tensor(self.used)}
        fresh = self.path.with_suffix(".fresh")
        torch.save(parts | numbers, fresh)
        os.replace(fresh, self.path)

    def train_step(self, batch: Batch, progress: float) -> dict[str, float]:
        """One batch forward, backward, update; returns what the log shows."""
        parameters = self.model.parameters
        parameters.zero_grad()
        result = self.model.loss(*batch)
        total = result.loss + self.recipe.balance * result.balance.mean()
        torch.autograd.backward(total)
        parameters.finish_grad()
        rate = rate_now(self.recipe, self.step, progress)
        norm = self.optimizer.step(self.step, rate)
        self.step += 1
        share = result.counts.float() / result.counts.sum(-1, keepdim=True)
        return {
            "loss": result.loss.item(),
            "balance": result.balance.mean().item(),
            "idle": (share < 0.01).float().mean().item(),
            "norm": norm,
            "rate": rate,
        }


def train(
    run: Run, clock: Clock, batches: Batches, save_minutes: float = 10, log_steps: int = 20
) -> bool:
    """Until the time is up (true) or the process is asked to end (false). Saves in both cases."""
    asked = _listen()
    saved, tokens, seconds = time.monotonic(), 0, 0.0
    while clock.progress < 1 and not asked:
        batch = batches[run.step]
        line = run.train_step(batch, clock.progress)
        seconds += clock.tick()
        run.used = clock.used
        tokens += batch[0].numel()
        if run.step % log_steps == 0:
            line |= {"step": run.step, "progress": clock.progress, "speed": tokens / seconds}
            print(json.dumps({key: round(one, 5) for key, one in line.items()}), flush=True)
            tokens, seconds = 0, 0.0
        if time.monotonic() - saved > 60 * save_minutes:
            run.save()
            saved = time.monotonic()
    run.save()
    return not asked


def _listen() -> list[int]:
    """A list that fills when the process is asked to end, so that it ends between two steps."""
    asked: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, remember)
    return asked


def finish(run: Run, name: str, work: Path, out: Path) -> None:
    """Weights, tokenizer and the facts only this run knows, for the card."""
    shape = run.model.shape
    export.write(shape, run.model.parameters.weight, out)
    tokenizer.save(Tokenizer.from_file(str(work / "tokenizer.json")), out, shape.positions)
    facts = {
        "name": name,
        "steps": run.step,
        "tokens": run.step * run.recipe.rows * shape.context,
        "seconds": round(run.used),
        "threads": torch.get_num_threads(),
        "recipe": dataclasses.asdict(run.recipe),
        "mix": data.MIX,
    }
    (out / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--work", type=Path, required=True, help="token files, checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="where the weights go at the end")
    parser.add_argument("--minutes", type=float, default=100.0, help="0: write the weights as is")
    parser.add_argument("--until", type=parse_until, help="HH:MM (UTC), the end in any case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rate", type=float, default=Recipe.rate)
    parser.add_argument("--balance", type=float, default=Recipe.balance)
    return parser.parse_args()


def main() -> None:
    """Command line: train, or continue where the checkpoint stands."""
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    tokens = arguments.work / "tokens"
    data.prepare(arguments.data, tokens)
    recipe = Recipe(rate=arguments.rate, balance=arguments.balance)
    shape = SHAPES[arguments.name]
    run = Run(shape, recipe, arguments.work / f"{arguments.name}.checkpoint.pt")
    clock = Clock(arguments.minutes, arguments.until, run.used)
    if train(run, clock, Batches(tokens, recipe, shape.context)):
        finish(run, arguments.name, tokens, arguments.out)


if __name__ == "__main__":
    main()
