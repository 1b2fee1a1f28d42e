"""One cell: every contestant loaded, then rounds in turns, then what each of them did.

Knows: cold loads, alternation, groups where memory does not hold everybody, floors' bandwidths
measured between rounds. Does not know: tables, JSON.

All contestants of a group are alive at once and wait for their turn asleep. Where memory does not
hold all of a cell, the group is split and the anchor plays in each, so that every ratio is taken
between two that alternated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import page_cache
from bench.cells import BESIDE_BYTES, Bar, Cell, stored_bytes, weight_files
from bench.contestants import CannotRun, Contestant, prepared
from bench.process import Process
from understudy import plan as planning

COLD = 0.01  # a file with more than this share in the page cache is not cold


@dataclass(slots=True)
class Rates:
    """The best bandwidths seen in this run, bytes/s: a floor must not be higher than possible."""

    file: Path
    block: int
    disk: float = 0.0
    memory: float = 0.0

    def measure(self) -> None:
        """One short look; called between rounds."""
        for threads in (4, 8):
            disk = planning.disk_bandwidth(self.file, threads, self.block, 192 * planning.MIB)
            self.disk = max(self.disk, disk or 0.0)
        # Much larger than any cache, which would answer faster than memory does.
        memory = planning.memory_bandwidth(512 * planning.MIB, repeats=2)
        self.memory = max(self.memory, memory)

    def saw(self, disk: float | None) -> None:
        """A contestant read at this rate, so the link can do it."""
        self.disk = max(self.disk, disk or 0.0)

    def floor(self, disk_bytes: float, memory_bytes: float) -> float:
        """Seconds that no program can beat: the two overlap, so the larger counts."""
        link = disk_bytes / self.disk if self.disk else 0.0
        return max(link, memory_bytes / self.memory if self.memory else 0.0)


@dataclass(slots=True)
class Entry:
    """What one contestant did in one cell; ``skipped``: why it did not."""

    contestant: Contestant
    group: int = 0
    skipped: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    laps: list[dict[str, Any]] = field(default_factory=list)
    file_bytes: int = 0
    rss_bytes: int | None = None
    group_peak_bytes: int | None = None


@dataclass(slots=True)
class Score:
    """One cell played."""

    cell: Cell
    entries: list[Entry]
    rates: Rates
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Course:
    """What every contestant is given: the first round warms up and is not counted."""

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Limits:
    """``budget``: what Understudy is told; ``cgroup``: what the kernel enforces."""

    budget: int | None
    cgroup: int | None

    @classmethod
    def of(cls, cell: Cell, model_bytes: int, enforced: bool) -> Limits:
        return cls(cell.budget(model_bytes), cell.limit(model_bytes) if enforced else None)


Say = Callable[[str], None]


def play(
    cell: Cell,
    twin: Path,
    contestants: Sequence[Contestant],
    course: Course,
    rates: Rates,
    bar: Bar,
    say: Say = lambda line: None,
    limited: bool = True,
) -> Score:
    """Play one cell; ``limited``: its limit is enforced by a cgroup, not only told.

    A contestant that cannot run becomes a skipped entry with its reason.
    """
    ready: list[tuple[Entry, Path]] = []
    entries: list[Entry] = []
    for contestant in contestants:
        if not contestant.runs_in(cell):
            continue
        entry = Entry(contestant)
        entries.append(entry)
        try:
            path = prepared(contestant, twin, bar)
        except CannotRun as reason:
            entry.skipped = str(reason)
        else:
            entry.file_bytes = stored_bytes(path)
            ready.append((entry, path))
    rates.measure()
    for number, group in enumerate(_groups(cell, stored_bytes(twin), ready)):
        for entry, _ in group:
            entry.group = number
            if entry not in entries:
                entries.append(entry)
        limits = Limits.of(cell, stored_bytes(twin), limited)
        _play_group(cell, limits, group, course, rates, bar, say)
    return Score(cell, entries, rates, len(course.prompts[0]))


def _groups(
    cell: Cell, model_bytes: int, ready: Sequence[tuple[Entry, Path]]
) -> list[list[tuple[Entry, Path]]]:
    """Split so that each group fits into what is free; the first contestant plays in every one."""
    free = planning.free_memory() - planning.RESERVE_BYTES

    def need(entry: Entry) -> int:
        return cell.limit(model_bytes) or entry.file_bytes + BESIDE_BYTES

    groups: list[list[tuple[Entry, Path]]] = []
    room = 0
    for entry, path in ready:
        if not groups:
            groups.append([])
            room = free
        elif need(entry) > room:
            anchor, anchor_path = ready[0]
            again = Entry(anchor.contestant, file_bytes=anchor.file_bytes)
            groups.append([(again, anchor_path)])
            room = free - need(anchor)
        groups[-1].append((entry, path))
        room -= need(entry)
    return groups


def _play_group(
    cell: Cell,
    limits: Limits,
    group: Sequence[tuple[Entry, Path]],
    course: Course,
    rates: Rates,
    bar: Bar,
    say: Say,
) -> None:
    with ExitStack() as stack:
        playing: list[tuple[Entry, Process]] = []
        for entry, path in group:
            try:
                process = _loaded(stack, cell, limits, entry, path, say)
            except CannotRun as reason:
                entry.skipped = str(reason)
            else:
                playing.append((entry, process))
        total = len(course.prompts) * len(playing)
        report = bar(f"{cell.name}: {len(course.prompts)} rounds of {len(playing)}")
        done = 0
        for number, (prompt, answer) in enumerate(zip(course.prompts, course.answers, strict=True)):
            for entry, process in playing:
                if entry.skipped is None:
                    _one_round(entry, process, prompt, answer, counted=number > 0)
                    if entry.laps:
                        rates.saw(entry.laps[-1].get("link_rate"))
                done += 1
                report(done, total)
            rates.measure()


def _loaded(
    stack: ExitStack, cell: Cell, limits: Limits, entry: Entry, path: Path, say: Say
) -> Process:
    """A process with its model loaded from a cold file, inside its limit."""
    held = page_cache.forget(weight_files(path))
    if limits.cgroup is not None and held > COLD:
        raise CannotRun(f"{held:.0%} of its file stays in the page cache, so no limit would bite")
    contestant = entry.contestant
    process = stack.enter_context(Process(contestant.name, contestant.runner, limits.cgroup))
    options = dict(contestant.options)
    if not contestant.own:
        options["scratch"] = str(path.parent)
    memory = limits.budget if contestant.told else None
    entry.facts = process.ask("load", model=str(path), memory=memory, options=options)
    for line in entry.facts.get("said", ()):
        say(f"{cell.name} {contestant.name}: {line}")
    return process


def _one_round(
    entry: Entry, process: Process, prompt: Sequence[int], answer: Sequence[int], counted: bool
) -> None:
    try:
        lap = process.ask(
            "round",
            prompt=list(prompt),
            answer=list(answer),
            seconds=entry.contestant.seconds,
        )
    except CannotRun as reason:
        entry.skipped = str(reason)
        return
    entry.rss_bytes, entry.group_peak_bytes = lap.pop("rss_bytes"), process.peak_bytes
    if counted:
        entry.laps.append(lap)
