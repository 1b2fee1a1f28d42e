"""Device slots: one allocation, equal places, and the fences between those who write and read them.

Knows: which expert's bytes a slot was last given, which copy into it may still be under way, and
which launch read it last. Does not know: who should be where (policies), or in which order copies
are asked for (queue).

    copy into a slot   waits for the last launch that reads it, and for the last copy into it
    a launch           waits for the last copy into each slot it reads

Both waits are between streams: the host waits for neither. With ``UNDERSTUDY_CHECK=1`` a slot is
filled with NaN before it is given to another expert, and whoever reads one must find the expert
that was asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from understudy.core import ExpertId
from understudy.experts.device import Device, Event, Stream
from understudy.experts.device.slab import Slab
from understudy.experts.store import Weights

POISON = 0xFF  # in every byte: NaN in bf16, fp16 and fp32


def checking() -> bool:
    """Whether slots are to be checked: ``UNDERSTUDY_CHECK=1``."""
    return os.environ.get("UNDERSTUDY_CHECK", "") not in ("", "0")


class WrongExpert(AssertionError):
    """A slot does not hold the expert that was asked for: a bug of ours."""


class DeviceSlots:
    """``slabs``: the layout of each MoE layer's experts. Raises `DeviceFull`."""

    def __init__(self, device: Device, slabs: Sequence[Slab], slots: int) -> None:
        self.device, self.slabs = device, slabs
        self.slot_bytes = slab_bytes(slabs)
        self.arena = device.allocate(slots * self.slot_bytes)
        self.checking = checking()
        self._holds: dict[int, ExpertId] = {}
        self._arriving: dict[int, Event] = {}
        self._read: dict[int, Event] = {}
        self._weights: dict[int, tuple[ExpertId, Weights]] = {}
        self._places: dict[int, torch.Tensor] = {}

    def memory(self, slot: int) -> torch.Tensor:
        """uint8 [slot_bytes]. Kept: making a view takes as long as asking for a copy."""
        if slot not in self._places:
            self._places[slot] = self.arena.narrow(0, slot * self.slot_bytes, self.slot_bytes)
        return self._places[slot]

    def weights(self, expert: ExpertId, slot: int) -> Weights:
        """The parameters of ``expert`` in ``slot``, as views."""
        known = self._weights.get(slot)
        if known is None or known[0] != expert:
            known = expert, self.slabs[expert.layer].views(self.memory(slot))
            self._weights[slot] = known
        return known[1]

    def claim(self, stream: Stream, slot: int) -> None:
        """What ``stream`` is asked for next may write to ``slot``."""
        for before in (self._read.pop(slot, None), self._arriving.pop(slot, None)):
            if before is not None:
                stream.wait(before)
        if self.checking:
            with stream:
                self.memory(slot).fill_(POISON)

    def copy_in(self, stream: Stream, expert: ExpertId, slot: int, source: torch.Tensor) -> Event:
        """Ask ``stream`` to bring ``expert`` from ``source`` to a slot that it has claimed. The
        event: it is there."""
        stream.copy(self.memory(slot)[: len(source)], source)
        self._holds[slot] = expert
        landed = self._arriving[slot] = stream.record()
        return landed

    @contextmanager
    def reading(self, ready: Sequence[tuple[ExpertId, int]]) -> Iterator[None]:
        """Inside, the compute stream may be asked for work that reads these slots."""
        compute = self.device.compute
        for expert, slot in ready:
            landed = self._arriving.pop(slot, None)
            if landed is not None:
                compute.wait(landed)
            if self.checking and self._holds.get(slot) != expert:
                raise WrongExpert(f"slot {slot} holds {self._holds.get(slot)}, not {expert}")
            self.device.reads(self.memory(slot))
        yield
        done = compute.record()
        for _, slot in ready:
            self._read[slot] = done

    def settle(self) -> None:
        """The compute stream waits for every copy that is under way."""
        for landed in self._arriving.values():
            self.device.compute.wait(landed)
        self._arriving.clear()

    def seated(self, residents: Sequence[tuple[ExpertId, int]]) -> None:
        """Others have filled the slots with these; the host has waited for it."""
        self._holds = {slot: expert for expert, slot in residents}
        self._read.clear()

    def close(self) -> None:
        """No launch may be under way. Kernels and recorded steps know the arena, and live as long
        as the model: its memory cannot wait for them."""
        self._weights.clear()
        self._places.clear()
        self.device.free(self.arena)


def slab_bytes(slabs: Sequence[Slab]) -> int:
    """Bytes of a slot that can hold an expert of any layer."""
    return max(slab.nbytes for slab in slabs)
