"""One cell of a benchmark: one model, one memory limit, everybody who runs there, in turn.

Knows: how rounds alternate, what is measured between them, and how a row is made of them. Does not
know: how a contestant works (`contestants`, `worker`), how tables look (`card`).

Two floors bound a decode step from below, per round, with the disk and the memory measured just
before and just after it (the better of the two: a floor may not lie above what the machine can do).
``own``: the bytes this policy missed / the disk's bandwidth. ``belady``: what a clairvoyant would
have missed with the same slots / the same bandwidth. Reading the touched weights from memory
overlaps with the disk, so each floor is the larger of the two times.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench import limits, twins
from bench.card import progress
from bench.contestants import Contestant, Gone, Running
from understudy import plan as planning

MIB = 1 << 20
SLOW_PROMPT = 64  # accelerate needs seconds per token: a shorter prompt and few tokens


@dataclass(frozen=True, slots=True)
class Cell:
    """``fraction``: of the model's bytes that everybody may hold; ``None``: all in RAM."""

    model: str
    fraction: float | None

    @classmethod
    def parse(cls, text: str) -> Cell:
        """``fine:33``, ``coarse:ram``."""
        model, _, share = text.partition(":")
        if model not in twins.EXPERTS:
            raise SystemExit(
                f"no model {model!r} in cell {text!r}; known: {', '.join(twins.EXPERTS)}"
            )
        if share == "ram":
            return cls(model, None)
        if not share.isdigit() or not 1 <= int(share) <= 100:
            raise SystemExit(
                f"cell {text!r}: write a percentage or ram behind the colon, as fine:33"
            )
        return cls(model, int(share) / 100)

    @property
    def name(self) -> str:
        return f"{self.model}:{'ram' if self.fraction is None else round(100 * self.fraction)}"


@dataclass(slots=True)
class Rates:
    """Bytes per second, at one moment."""

    disk: float
    memory: float

    @classmethod
    def now(cls, model: Path) -> Rates:
        largest = max(model.glob("*.safetensors"), key=lambda f: f.stat().st_size)
        block = min(2 * MIB, largest.stat().st_size)
        disk = max(planning.disk_bandwidth(largest, 4, block, 256 * MIB) or 0.0 for _ in range(2))
        return cls(disk, planning.memory_bandwidth(repeats=3))

    def better(self, other: Rates) -> Rates:
        return Rates(max(self.disk, other.disk), max(self.memory, other.memory))

    def floor(self, disk_bytes: float, memory_bytes: float) -> float:
        return max(disk_bytes / self.disk if self.disk else 0.0, memory_bytes / self.memory)


@dataclass(slots=True)
class Record:
    """What one contestant did in one cell: its rounds, with the rates around each."""

    contestant: Contestant
    rounds: list[tuple[dict[str, Any], Rates]] = field(default_factory=list)
    skipped: str | None = None
    card: dict[str, Any] = field(default_factory=dict)
    peak: int = 0


def run_cell(
    cell: Cell, model: Path, everybody: Sequence[Contestant], prompts: Sequence[Sequence[int]],
    new: int, seconds: float, *, limit: bool = True,
) -> list[Record]:  # fmt: skip
    """Rounds in turn, A B C A B C; the first prompt warms up and is not counted. ``limit``: whether
    the budget is also enforced from outside."""
    records = [Record(c) for c in everybody]
    size = twins.nbytes(model)
    budget = None if cell.fraction is None else int(cell.fraction * size)
    if budget is not None and limit:
        limits.drop_caches()
        share = limits.cached_share(sorted(model.glob("*.safetensors")))
        progress(f"[{cell.name}] {100 * share:.1f} % of the model is in the page cache")
    with ExitStack() as stack:
        running: dict[str, Running] = {}
        for record in records:
            _start(record, cell, model, budget, stack, running, limit)
        rates = Rates.now(model)
        for number, prompt in enumerate(prompts):
            for record in records:
                if record.contestant.name in running:
                    rates = _round(record, running, list(prompt), new, seconds, model, rates,
                                   counted=number > 0)  # fmt: skip
            progress(f"[{cell.name}] round {number} of {len(prompts) - 1} done")
        for record in records:
            if record.contestant.name in running:
                record.peak = _peak(running[record.contestant.name])
    return records


def _start(
    record: Record, cell: Cell, model: Path, budget: int | None, stack: ExitStack,
    running: dict[str, Running], limit: bool,
) -> None:  # fmt: skip
    contestant = record.contestant
    group = None
    try:
        if budget is not None and limit:
            group = stack.enter_context(
                limits.limited(contestant.name.replace(".", "-"), budget + limits.OVERHEAD)
            )
        started = Running(contestant, model, budget, group)
        stack.callback(started.stop)
        record.card, running[contestant.name] = started.card, started
    except (Gone, limits.NoLimits) as e:
        record.skipped = str(e)
        progress(f"[{cell.name}] {contestant.name} is skipped: {e}")


def _round(
    record: Record, running: dict[str, Running], prompt: list[int], new: int, seconds: float,
    model: Path, before: Rates, *, counted: bool,
) -> Rates:  # fmt: skip
    slow = record.contestant.kind == "accelerate"
    try:
        answer = running[record.contestant.name].ask(
            ids=prompt[:SLOW_PROMPT] if slow else prompt, new=4 if slow else new, seconds=seconds
        )
    except Gone as e:
        record.skipped = str(e)
        progress(f"{record.contestant.name} ended: {e}")
        running.pop(record.contestant.name).stop()
        return before
    after = Rates.now(model)
    if counted:
        record.rounds.append((answer, before.better(after)))
    return after


def _peak(running: Running) -> int:
    if running.group is not None:
        return running.group.peak()
    try:
        status = Path(f"/proc/{running.process.pid}/status").read_text()
    except OSError:
        return 0
    return next(int(x.split()[1]) * 1024 for x in status.splitlines() if x.startswith("VmHWM"))


# ------------------------------------------------------------------------------------------ rows


def row(cell: Cell, record: Record) -> dict[str, Any]:
    """The JSON of one contestant in one cell. Times in ms per token, bytes per token."""
    c = record.contestant
    found: dict[str, Any] = {
        "model": cell.model, "budget_fraction": cell.fraction, "contestant": c.name,
        "format": c.format, "skipped": record.skipped if not record.rounds else None,
    }  # fmt: skip
    if not record.rounds:
        return found
    steps = [len(r["times"]) - 1 for r, _ in record.rounds]
    tpots = [1e3 * (r["times"][-1] - r["times"][0]) / n
             for (r, _), n in zip(record.rounds, steps, strict=True)]  # fmt: skip
    found |= {
        "tpot_ms": median(tpots), "tpot_min_ms": min(tpots), "tpot_max_ms": max(tpots),
        "ttft_ms": 1e3 * median(r["ttft"] for r, _ in record.rounds),
        "bytes_per_token": median(r["read"] / n for (r, _), n in zip(record.rounds, steps, strict=True)),
        "rss_bytes": record.peak, "tokens": steps[0] + 1, "rounds": len(steps),
        "disk_gbs": median(rates.disk for _, rates in record.rounds) / 1e9,
        "memory_gbs": median(rates.memory for _, rates in record.rounds) / 1e9,
    }  # fmt: skip
    return found | (_own(record, steps, tpots) if c.ours else {})


def _own(record: Record, steps: Sequence[int], tpots: Sequence[float]) -> dict[str, Any]:
    """What only our engine counts."""
    own, best, above = [], [], []
    for (r, rates), n, tpot in zip(record.rounds, steps, tpots, strict=True):
        own.append(1e3 * rates.floor((r["read"] - r["wasted"]) / n, r["memory"] / n))
        best.append(1e3 * rates.floor(r["belady"] / n, r["memory"] / n))
        above.append(tpot / own[-1])
    total = {name: sum(r[name] for r, _ in record.rounds)
             for name in ("hits", "late", "misses", "read", "wasted", "belady", "issued", "used")}  # fmt: skip
    lookups = max(1, total["hits"] + total["late"] + total["misses"])
    needed = total["used"] + total["misses"]
    return {
        "hit_rate": total["hits"] / lookups,
        "late_rate": total["late"] / lookups,
        "stall_ms": 1e3 * sum(r["stall"] for r, _ in record.rounds) / sum(steps),
        "expert_ms": 1e3 * sum(r["expert_seconds"] for r, _ in record.rounds) / sum(steps),
        "wasted_bytes_per_token": total["wasted"] / sum(steps),
        "prefetch_precision": total["used"] / total["issued"] if total["issued"] else None,
        "prefetch_recall": total["used"] / needed if total["issued"] and needed else None,
        "floor_own_ms": median(own), "floor_belady_ms": median(best),
        "over_floor_own": median(above),
        "bytes_over_belady": total["read"] / total["belady"] if total["belady"] else None,
    }  # fmt: skip
