"""What is measured in which order, and when the time is over.

Knows: kinds of work, how long the last of a kind took, the most informative order. Does not know:
how anything is measured.

An accelerator may be there for minutes. So the budgets that say most come first, and what would not
end in time is left out by name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

BUDGETS = (50, 25, 75, 10)  # percent of the experts on the device: the most informative first

# Seconds that work of a kind is expected to take before one of it was done. From then on the last
# one's time is expected again.
FIRST_GUESS = {
    "micro": 75.0,
    "formats": 45.0,
    "twin": 45.0,
    "twin-large": 120.0,
    "qwen3": 120.0,
    "prefill": 45.0,
}


@dataclass(frozen=True, slots=True)
class Task:
    """``kind``: micro, formats, prefill, or the model of a cell; ``percent``: of a cell."""

    kind: str
    percent: int | None = None

    @property
    def name(self) -> str:
        return self.kind if self.percent is None else f"{self.kind}:{self.percent}"


def tasks(models: Sequence[str], percents: Sequence[int], only: Sequence[str] = ()) -> list[Task]:
    """In the order in which they say most. ``only``: names of tasks, or of their kinds."""
    first, *later = percents
    prefill = [Task("prefill", 25)] if "twin" in models else []
    found = [
        Task("micro"),
        *(Task(model, first) for model in models),
        *prefill,
        *(Task(model, percent) for percent in later for model in models),
        Task("formats"),
    ]
    return [task for task in found if not only or {task.name, task.kind} & set(only)]


@dataclass(slots=True)
class TimeBudget:
    """``seconds`` from now on, by ``clock``."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    left_out: list[str] = field(default_factory=list)
    _took: dict[str, float] = field(default_factory=dict)
    _started: float = field(init=False)

    def __post_init__(self) -> None:
        self._started = self.clock()

    @property
    def spent(self) -> float:
        return self.clock() - self._started

    @property
    def left(self) -> float:
        return self.seconds - self.spent

    def expected(self, kind: str) -> float:
        return self._took.get(kind, FIRST_GUESS.get(kind, 60.0))

    def allows(self, task: Task) -> bool:
        """Whether it would end in time, or half of a cell would: its first rows say most, and it
        stops by itself. If not, it is remembered as left out."""
        least = self.expected(task.kind) * (1.0 if task.percent is None else 0.5)
        if least <= self.left:
            return True
        left = max(0.0, self.left)
        self.left_out.append(f"{task.name}: {left:.0f} s were left, {least:.0f} needed")
        return False

    @contextmanager
    def spending(self, task: Task) -> Iterator[None]:
        """Around the task: the next one of its kind is expected to take as long."""
        started = self.clock()
        yield
        self._took[task.kind] = self.clock() - started
