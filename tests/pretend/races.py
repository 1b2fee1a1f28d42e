"""Which work is known to happen before which, and who touches memory without such an order.

Knows: participants (the host and every stream), their clocks, ranges of addresses. Does not know:
what a stream is made of, or when anything is really done.

A participant counts what it was asked to do. A clock says, for each participant, how much of that
is known to be over: work number n of stream s happens before everything whose clock has s at n or
later. Two pieces of work that touch the same bytes, one of them writing, must be ordered so.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils._python_dispatch import _disable_current_modes

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
            if not overlap((first, last), (start, end)):
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
        return [a for first, last, a in self._open if overlap((first, last), (start, end))]


class Sources:
    """What the host must leave alone: memory that copies read, until it knows that they have.

    Such a copy may read at any time between. The bytes of the moment when it was asked for are
    kept, and compared when it happens here and when the host knows of it."""

    def __init__(self, where: Callable[[int, int], str]) -> None:
        self._where = where
        self._then: dict[Access, bytes] = {}

    def enter(self, reading: Access) -> None:
        """The same stream's newer copy of the same memory stands in for the older one."""
        for earlier in list(self._then):
            if (earlier.participant, earlier.range) == (reading.participant, reading.range):
                self.check(earlier)
                del self._then[earlier]
        self._then[reading] = content(reading.memory)

    def check(self, reading: Access) -> None:
        if reading in self._then and self._then[reading] != content(reading.memory):
            raise Race(
                f"{self._where(*reading.range)} was overwritten by the host, which did not know "
                f"that it had been {reading.what}"
            )

    def written(self, start: int, end: int) -> None:
        """By another copy: what is ordered so is the ledger's business."""
        for reading in list(self._then):
            if overlap(reading.range, (start, end)):
                del self._then[reading]

    def forget(self, known: Clock) -> None:
        """The host knows so much to be over, and may write from now on."""
        for reading in list(self._then):
            if known.get(reading.participant, 0) >= reading.number:
                self.check(reading)
                del self._then[reading]


def extent(memory: torch.Tensor) -> tuple[int, int]:
    """First address, and the one behind the last."""
    start = memory.data_ptr()
    if memory.numel() == 0:
        return start, start
    steps = zip(memory.shape, memory.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in steps)
    return start, start + (last + 1) * memory.element_size()


def overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] < other[1] and other[0] < one[1]


def content(memory: torch.Tensor) -> bytes:
    with _disable_current_modes(), torch.inference_mode():  # no part of what is being recorded
        whole = memory.contiguous()
        return ctypes.string_at(whole.data_ptr(), whole.numel() * whole.element_size())


def caller() -> str:
    """The line of the code under test that asks for something."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _ours(Path(frame.f_code.co_filename)):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _ours(file: Path) -> bool:
    return file.parent == HERE or TORCH in file.parents or file.name == "contextlib.py"
