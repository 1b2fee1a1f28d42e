"""How many tokens per second does a batch write, beside the bytes that its routing needs?

    python bench/serve.py [--models fine,coarse] [--batches 1,8,32] [--slots 33%] [--repeats 5]
                          [--smoke] [--json]

The batching engine itself, without HTTP: batches of different sizes take turns on one engine that
holds ``--slots`` of the wide twin's experts, each continues real text (dictated: every size decodes
text, none decodes what it prefers), and only steps in which the whole batch writes are counted.

    the byte bound    the union of experts of every (step, layer) was recorded. It is replayed
                      through the engine's own evictor with the same slots, nobody speculating:
                      what is missed there must be read, whoever schedules. Bytes / the link's best
                      bandwidth of this run, or the weights that a step touches / memory bandwidth,
                      whichever takes longer
    read              the same with the bytes that the engine really read, useless ones left out
    clairvoyant       the same with what an evictor who knows the future would miss

Experts are read past the page cache, so nothing but the slots holds them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from bench import card as cards
from bench import cells as places
from bench import contest, show
from bench.match import Course, Rates
from understudy.batch import Ask, Delta, Report, Sampling, StepReport
from understudy.batch.engine import BatchEngine
from understudy.batch.opening import start
from understudy.batch.paged import PAGE
from understudy.core import Counters, LayerEvent, UnderstudyError
from understudy.simulate import replay

TARGET = 0.85  # of the byte bound, from batch 8 on
LEAST = 256 << 20  # bytes; what a shorter look at the link says is noise
PATIENCE = 600.0  # seconds for one round

COLUMNS = (
    ("model", lambda r: r["model"]),
    ("batch", lambda r: str(r["batch"])),
    ("tokens/s", lambda r: f"{r['tokens_per_second']:.2f}"),
    ("min-max", lambda r: f"{r['tokens_per_second_min']:.2f}-{r['tokens_per_second_max']:.2f}"),
    ("bound", lambda r: f"{r['bound_tokens_per_second']:.2f}"),
    ("of bound", lambda r: f"{r['of_bound']:.2f}"),
    ("of read", lambda r: f"{r['of_read']:.2f}"),
    ("of clairvoyant", lambda r: f"{r['of_clairvoyant']:.2f}"),
    ("ms/step", lambda r: show.ms(r["step_ms"])),
    ("stall", lambda r: show.ms(r["stall_ms"])),
    ("union/step", lambda r: show.size(r["union_bytes"])),
    ("must read", lambda r: show.size(r["bound_bytes"])),
    ("read", lambda r: show.size(r["read_bytes"])),
    ("hits", lambda r: show.percent(r["hit_rate"])),
)


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


class Bench:
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


def measure(model: str, twin: Path, options: argparse.Namespace) -> tuple[list[Any], Rates]:
    """The rows of one model. The first round of each size warms up."""
    largest = max(options.batches)
    engine = start(
        twin,
        memory=options.memory,
        slots=options.slots,
        max_num_seqs=largest,
        max_context=-(-(options.prompt_tokens + options.new_tokens) // PAGE) * PAGE,
        on_status=show.say,
    )
    try:
        bench = Bench(engine)
        rates = _rates(twin, bench.plan.expert_bytes)
        course = contest.texts(
            twin, largest * (options.repeats + 1), options.prompt_tokens, options.new_tokens
        )
        scores = [Score(size) for size in options.batches]
        _alternate(bench, scores, course, rates, model)
        return [score.row(model, bench.plan.dense, rates) for score in scores], rates
    finally:
        engine.close()
        engine.engine.close()


def _rates(twin: Path, expert_bytes: int) -> Rates:
    file = max(places.weight_files(twin), key=lambda f: f.stat().st_size)
    rates = Rates(file, min(8 << 20, expert_bytes))
    rates.measure()
    return rates


def _alternate(
    bench: Bench, scores: Sequence[Score], course: Course, rates: Rates, model: str
) -> None:
    """A B C A B C: every round has its own texts, smaller batches the first of them."""
    largest = max(score.batch for score in scores)
    rounds = len(course.prompts) // largest
    report = show.progress(f"{model}: {rounds} rounds of {len(scores)} batch sizes")
    for number in range(rounds):
        for done, score in enumerate(scores, number * len(scores)):
            texts = slice(number * largest, number * largest + score.batch)
            lap = bench.round(course.prompts[texts], course.answers[texts])
            rates.saw(lap.link_rate)
            if number > 0:
                score.laps.append(lap)
            report(done + 1, rounds * len(scores))
        rates.measure()


# --------------------------------------------------------------------------------------- command


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


def sizes(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="fine,coarse", help="(%(default)s)")
    parser.add_argument("--batches", type=sizes, default="1,8,32", help="(%(default)s)")
    parser.add_argument("--slots", default="33%", help="of the experts (%(default)s)")
    parser.add_argument("--memory", default="auto", help="must hold them (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds (%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=49, help="(%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="small twins, few rounds")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    parser.add_argument("--output", type=Path, help="write the JSON there, too")
    if "--smoke" in sys.argv:
        parser.set_defaults(repeats=2, batches="1,4", prompt_tokens=16, new_tokens=9)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    try:
        twins = {
            name: places.twin(places.Cell.parse(f"{name}:ram").model, show.progress, options.smoke)
            for name in options.models.split(",")
        }
        note = (
            f"{options.repeats} rounds and one to warm up, batches of "
            f"{', '.join(map(str, options.batches))} in turns; "
            f"{options.prompt_tokens} tokens of real text each, then {options.new_tokens} more of "
            f"it, dictated; {options.slots} of the experts held, reads past the page cache"
        )
        card = cards.card(twins, note)
        cards.show(card)
        rows: list[dict[str, Any]] = []
        for name, twin in twins.items():
            found, rates = measure(name, twin, options)
            rows += found
            card.setdefault("rates", {})[name] = {
                "disk_bytes_per_second": round(rates.disk),
                "memory_bytes_per_second": round(rates.memory),
            }
    except UnderstudyError as error:
        show.say(f"error: {error}")
        return 2
    if not options.json:
        print(show.table(rows, COLUMNS))
        print()
        print(show.ratios_text(ratios(rows)))
    last = json.dumps({"rows": rows, "ratios": ratios(rows), "target": TARGET, "card": card})
    if options.output:
        options.output.write_text(last + "\n", encoding="utf-8")
    print(last)
    return 0


if __name__ == "__main__":
    sys.exit(main())
