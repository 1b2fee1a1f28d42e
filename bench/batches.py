"""Rounds of the batching engine: so many answers at once, and the bytes that their routing needs.

Knows: the engine without HTTP, recorded events, replays. Does not know: arguments, tables.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from bench.match import Rates
from understudy.batch import Ask, Delta, Report, Sampling, StepReport
from understudy.batch.engine import BatchEngine
from understudy.core import Counters, LayerEvent, UnderstudyError
from understudy.simulate import replay

LEAST = 256 << 20  # bytes; what a shorter look at the link says is noise
PATIENCE = 600.0  # seconds for one round

# ------------------------------------------------------------------------------------ dictation


class Dictation:
    """A grammar with one sentence in it: `understudy.batch.Grammar`."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens

    def begin(self) -> Place:
        return Place(self._tokens)


class Place:
    """Where one answer stands in it: `understudy.batch.Matcher`."""

    complete = False

    def __init__(self, tokens: Sequence[int]) -> None:
        self._left = iter(tokens)
        self._next = next(self._left)

    def constrain(self, scores: torch.Tensor) -> None:
        kept = scores[self._next].clone()
        scores.fill_(-torch.inf)
        scores[self._next] = kept

    def accept(self, token: int) -> None:
        self._next = next(self._left, self._next)


# --------------------------------------------------------------------------------------- a round


@dataclass(frozen=True, slots=True)
class Mark:
    """The end of one step: when, what it did, and how many events were recorded by then."""

    at: float
    step: StepReport
    events: int


class Watch:
    """Marks the end of every step: `understudy.batch.Observer`."""

    def __init__(self, runtime: Any) -> None:
        self._runtime = runtime
        self.marks: list[Mark] = []

    def on_step(self, step: StepReport) -> None:
        self.marks.append(Mark(time.perf_counter(), step, len(self._runtime.recording or ())))

    def on_token(self, seconds: float) -> None:
        pass

    def on_finish(self, ask: Ask, finish: str, report: Report) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Lap:
    """The steps of one round in which the whole batch wrote. Bytes are of all of them."""

    seconds: float
    steps: int
    counters: Counters
    union_bytes: int
    bound_bytes: int
    best_bytes: int
    link_rate: float | None

    @property
    def read_bytes(self) -> int:
        return max(0, self.counters.bytes_read - self.counters.wasted_bytes)


class Rounds:
    """One engine, and rounds on it."""

    def __init__(self, engine: BatchEngine) -> None:
        self.engine, self.plan = engine, engine.engine.plan
        self._handle = engine.engine.model.understudy
        self._watch = Watch(self._handle.runtime)
        engine.add_observer(self._watch)

    def round(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Lap:
        self._watch.marks.clear()
        meter = self._handle.runtime.transfer.meter
        before = meter.nbytes, meter.busy
        self._handle.start_recording()
        self._answer(prompts, answers)
        events = self._handle.stop_recording()
        read, busy = meter.nbytes - before[0], meter.busy - before[1]
        return self._lap(len(prompts), events, read / busy if read > LEAST else None)

    def _answer(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> None:
        over = threading.Semaphore(0)
        failed: list[Exception] = []

        def sink(delta: Delta) -> None:
            if delta.error is not None:
                failed.append(delta.error)
            if delta.last:
                over.release()

        for prompt, answer in zip(prompts, answers, strict=True):
            self.engine.submit(
                Ask(
                    tuple(prompt),
                    len(answer),
                    Sampling(temperature=0.0),
                    ignore_eos=True,
                    grammar=Dictation(answer),
                ),
                sink,
            )
        for _ in prompts:
            if not over.acquire(timeout=PATIENCE):
                raise UnderstudyError(f"a round took more than {PATIENCE:.0f} s; see what hangs")
        if failed:
            raise failed[0]

    def _lap(self, batch: int, events: Sequence[LayerEvent], rate: float | None) -> Lap:
        full = [
            mark
            for mark in self._watch.marks
            if mark.step.new_tokens == batch and not mark.step.prompt_tokens
        ]
        if len(full) < 2:
            raise UnderstudyError("no two steps had the whole batch; try more --new-tokens")
        first, last = full[0], full[-1]
        steps = len(full) - 1
        if self._watch.marks.index(last) - self._watch.marks.index(first) != steps:
            raise UnderstudyError("the batch was not whole all the time; try a larger --kv-memory")
        size = self.plan.expert_bytes
        needed = sum(len(event.needed()) for event in events[first.events : last.events])
        counters = Counters()
        for mark in full[1:]:
            counters = counters + mark.step.counters
        evictor = self._handle.policies["evictor"]
        return Lap(
            seconds=last.at - first.at,
            steps=steps,
            counters=counters,
            union_bytes=needed * size,
            bound_bytes=self._missed(events, first.events, last.events, evictor) * size,
            best_bytes=self._missed(events, first.events, last.events, "belady") * size,
            link_rate=rate,
        )

    def _missed(self, events: Sequence[LayerEvent], first: int, last: int, evictor: str) -> int:
        layers = len(self._handle.anatomy.modules)
        counted = replay(
            events[:last], slots=self.plan.slots, layers=layers, evictor=evictor, from_event=first
        )
        return counted.misses


# ------------------------------------------------------------------------------------------ rows


@dataclass(slots=True)
class Score:
    """All counted rounds of one batch size."""

    batch: int
    laps: list[Lap] = field(default_factory=list)

    def row(self, model: str, dense: int, rates: Rates) -> dict[str, Any]:
        laps, steps = self.laps, sum(lap.steps for lap in self.laps)
        step = median(lap.seconds / lap.steps for lap in laps)
        speeds = [self.batch * lap.steps / lap.seconds for lap in laps]
        union, bound, best, read = (
            sum(getattr(lap, name) for lap in laps) / steps
            for name in ("union_bytes", "bound_bytes", "best_bytes", "read_bytes")
        )
        floors = [rates.floor(nbytes, dense + union) for nbytes in (bound, read, best)]
        counted = sum((lap.counters for lap in laps), Counters())
        return {
            "model": model,
            "batch": self.batch,
            "skipped": None,
            "rounds": len(laps),
            "steps": steps // len(laps),
            "tokens_per_second": round(median(speeds), 3),
            "tokens_per_second_min": round(min(speeds), 3),
            "tokens_per_second_max": round(max(speeds), 3),
            "bound_tokens_per_second": round(self.batch / floors[0], 3),
            "of_bound": round(floors[0] / step, 3),
            "of_read": round(floors[1] / step, 3),
            "of_clairvoyant": round(floors[2] / step, 3),
            "step_ms": round(1000 * step, 3),
            "stall_ms": round(1000 * counted.stall_seconds / steps, 3),
            "union_bytes": round(union),
            "bound_bytes": round(bound),
            "read_bytes": round(read),
            "best_bytes": round(best),
            "link_ms": round(1000 * rates.floor(bound, 0.0), 3),
            "memory_ms": round(1000 * rates.floor(0.0, dense + union), 3),
            "hit_rate": round(counted.hits / max(1, counted.lookups), 4),
        }


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What has a target: of the bound, and against batch 1."""
    alone = {row["model"]: row["tokens_per_second"] for row in rows if row["batch"] == 1}
    out: dict[str, float] = {}
    for row in rows:
        name = f"{row['model']} batch {row['batch']}"
        out[f"{name} of the byte bound"] = row["of_bound"]
        if row["batch"] > 1 and row["model"] in alone:
            out[f"{name} / batch 1"] = round(row["tokens_per_second"] / alone[row["model"]], 3)
    return out
