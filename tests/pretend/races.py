"""Which work is known to happen before which, and who touches memory without such an order.

Knows: participants (the host and every stream), their clocks, ranges of addresses. Does not know:
what a stream is made of, or when anything is really done.

A participant counts what it was asked to do. A clock says, for each participant, how much of that
is known to be over: work number n of stream s happens before everything whose clock has s at n or
later. Two pieces of work that touch the same bytes, one of them writing, must be ordered so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

HERE, TORCH = Path(__file__).parent, Path(torch.__file__).parent


class Race(AssertionError):
    """Two pieces of work touch the same memory, and no fence says which comes first."""


class Clock(dict[int, int]):
    """Participant -> how many pieces of its work are known to be over."""

    def join(self, other: Clock) -> None:
        for participant, count in other.items():
            if count > self.get(participant, 0):
                self[participant] = count

    def covers(self, other: Clock) -> bool:
        return all(self.get(participant, 0) >= count for participant, count in other.items())


@dataclass(frozen=True, slots=True, eq=False)
class Access:
    """Work number ``number`` of ``participant`` touches ``memory`` (kept, so that its addresses are
    not given to anything else)."""

    memory: torch.Tensor
    participant: int
    number: int
    writes: bool
    what: str

    @property
    def range(self) -> tuple[int, int]:
        return extent(self.memory)


class Ledger:
    """Every access that the host does not know to be over yet."""

    def __init__(self, where: Callable[[int, int], str]) -> None:
        """``where``: a name for a range of addresses."""
        self._where = where
        self._open: list[tuple[int, int, Access]] = []

    def enter(self, access: Access, clock: Clock) -> None:
        """``clock``: what is known to be over when ``access`` happens. Raises `Race`."""
        start, end = access.range
        kept = []
        for entry in self._open:
            first, last, earlier = entry
            if last <= start or end <= first:
                kept.append(entry)
                continue
            ordered = clock.get(earlier.participant, 0) >= earlier.number
            if not ordered and (earlier.writes or access.writes):
                place = self._where(max(start, first), min(end, last))
                raise Race(f"{place}: {access.what} is not ordered after {earlier.what}")
            stands_in = start <= first and last <= end and (access.writes or not earlier.writes)
            if not (ordered and stands_in):
                kept.append(entry)
        self._open = [*kept, (start, end, access)]

    def forget(self, known: Clock) -> None:
        """The host knows so much to be over, and whatever it asks for comes after that."""
        self._open = [e for e in self._open if known.get(e[2].participant, 0) < e[2].number]

    def touching(self, start: int, end: int) -> list[Access]:
        return [a for first, last, a in self._open if first < end and start < last]


def extent(memory: torch.Tensor) -> tuple[int, int]:
    """First address, and the one behind the last."""
    start = memory.data_ptr()
    if memory.numel() == 0:
        return start, start
    steps = zip(memory.shape, memory.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return start, start + (last + 1) * memory.element_size()


def caller() -> str:
    """The line of the code under test that asks for something."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _ours(Path(frame.f_code.co_filename)):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _ours(file: Path) -> bool:
    return file.parent == HERE or TORCH in file.parents or file.name == "contextlib.py"
