"""The residency book of one tier: who holds which slot, and in what state.

Knows: slots as numbers, experts as ids. Does not know: bytes, addresses, time, who should leave.
Not thread-safe: whoever shares a book holds one lock around every call.

    FREE -> RESERVED -> IN_FLIGHT -> READY -> FREE
                 \\___________\\________/        (fail)

Rules: one expert holds at most one slot; only a READY slot without pins may be taken from its
expert; pins protect an expert from the moment its event was looked up until it was computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from understudy.core import ExpertId


class State(Enum):
    FREE = "free"
    RESERVED = "reserved"
    IN_FLIGHT = "in flight"
    READY = "ready"


@dataclass(slots=True)
class Slot:
    """One place for one expert. ``unused``: brought by speculation, not needed by anyone yet."""

    index: int
    state: State = State.FREE
    expert: ExpertId | None = None
    pins: int = 0
    unused: bool = False


class BookError(AssertionError):
    """The book was asked for an impossible step: a bug of ours, never of a user."""


class Residency:
    """See the head of this file. ``slots``: how many experts fit."""

    def __init__(self, slots: int) -> None:
        self.slots = [Slot(i) for i in range(slots)]
        self._free = list(range(slots - 1, -1, -1))
        self._where: dict[ExpertId, Slot] = {}
        self.slot: Callable[[ExpertId], Slot | None] = self._where.get  # asked most of all

    def __len__(self) -> int:
        return len(self._where)

    def __iter__(self) -> Iterator[ExpertId]:
        return iter(self._where)

    def __contains__(self, expert: ExpertId) -> bool:
        return expert in self._where

    def __getitem__(self, expert: ExpertId) -> Slot:
        return self._where[expert]

    @property
    def free(self) -> int:
        """How many slots hold nobody."""
        return len(self._free)

    def state(self, expert: ExpertId) -> State:
        slot = self._where.get(expert)
        return State.FREE if slot is None else slot.state

    def ready(self, expert: ExpertId) -> bool:
        slot = self._where.get(expert)
        return slot is not None and slot.state is State.READY

    def evictable(self, expert: ExpertId) -> bool:
        slot = self._where.get(expert)
        return slot is not None and slot.state is State.READY and slot.pins == 0

    # ------------------------------------------------------------------------------- transitions

    def reserve(self, expert: ExpertId, *, unused: bool = False) -> Slot:
        """FREE -> RESERVED. A free slot must exist; see `evict`."""
        if expert in self._where:
            raise BookError(f"{expert} already holds a slot")
        if not self._free:
            raise BookError("no free slot")
        slot = self.slots[self._free.pop()]
        slot.state, slot.expert, slot.unused = State.RESERVED, expert, unused
        self._where[expert] = slot
        return slot

    def seat(self, expert: ExpertId, index: int) -> None:
        """FREE -> READY in this very slot: somebody else has brought it there."""
        if expert in self._where or index not in self._free:
            raise BookError(f"{expert} cannot take slot {index}: {self.slots[index]}")
        self._free.remove(index)
        slot = self.slots[index]
        slot.state, slot.expert = State.READY, expert
        self._where[expert] = slot

    def launch(self, expert: ExpertId) -> None:
        """RESERVED -> IN_FLIGHT: its first byte was asked for."""
        self._step(expert, State.RESERVED, State.IN_FLIGHT)

    def land(self, expert: ExpertId) -> None:
        """IN_FLIGHT -> READY: its last byte arrived."""
        self._step(expert, State.IN_FLIGHT, State.READY)

    def fail(self, expert: ExpertId) -> None:
        """RESERVED or IN_FLIGHT -> FREE: cancelled, or the read failed. Pins go with it."""
        slot = self._where.get(expert)
        if slot is None or slot.state is State.READY:
            raise BookError(f"{expert} is not on its way, it cannot fail: {slot}")
        self._release(slot)

    def evict(self, expert: ExpertId) -> Slot:
        """READY without pins -> FREE. Returns the slot as it was (for the ``unused`` mark)."""
        if not self.evictable(expert):
            raise BookError(f"{expert} may not leave: {self._where.get(expert)}")
        slot = self._where[expert]
        before = Slot(slot.index, slot.state, expert, 0, slot.unused)
        self._release(slot)
        return before

    def pin(self, expert: ExpertId) -> None:
        slot = self._where.get(expert)
        if slot is None:
            raise BookError(f"{expert} holds no slot to be pinned in")
        slot.pins += 1

    def unpin(self, expert: ExpertId) -> None:
        slot = self._where.get(expert)
        if slot is None or slot.pins == 0:
            raise BookError(f"{expert} is not pinned")
        slot.pins -= 1

    def _step(self, expert: ExpertId, old: State, new: State) -> None:
        slot = self._where.get(expert)
        if slot is None or slot.state is not old:
            raise BookError(f"{expert}: expected {old.value}, found {slot}")
        slot.state = new

    def _release(self, slot: Slot) -> None:
        assert slot.expert is not None
        del self._where[slot.expert]
        slot.state, slot.expert, slot.pins, slot.unused = State.FREE, None, 0, False
        self._free.append(slot.index)

    # ----------------------------------------------------------------------------------- checking

    def check_integrity(self, *, idle: bool = False) -> None:
        """Raise `BookError` if the book contradicts itself. ``idle``: no event is running, so
        nobody may hold a pin."""
        if len(self._free) != len(set(self._free)):
            raise BookError("a free slot is listed twice")
        for slot in self.slots:
            if (slot.state is State.FREE) != (slot.index in self._free):
                raise BookError(f"slot {slot.index} is {slot.state.value} and in the wrong list")
            if slot.state is State.FREE and (slot.expert or slot.pins or slot.unused):
                raise BookError(f"free slot {slot.index} still belongs to somebody")
            if slot.expert is not None and self._where.get(slot.expert) is not slot:
                raise BookError(f"slot {slot.index} and the index disagree on {slot.expert}")
            if slot.pins < 0 or (idle and slot.pins):
                raise BookError(f"slot {slot.index} has {slot.pins} pins")
        if len(self._where) + len(self._free) != len(self.slots):
            raise BookError("slots were lost")
