"""Host memory that the device can read by itself: few large blocks, pinned as far as allowed.

Knows: slots of equal size, the blocks they lie in, what the system refuses. Does not know: experts,
or who uses a slot when.

Systems refuse to pin for reasons of their own (limits on locked memory, the driver's tables, what
else is pinned), and only trying tells. What was refused becomes ordinary memory: everything still
works, and `Slabs.note` says what it costs.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import torch

from understudy.experts.device import Device, PinningRefused
from understudy.experts.store import PAGE, Arena

MIB, GIB = 1 << 20, 1 << 30
BLOCK = GIB  # one registration; each costs the driver a table, and the process a system call
PROBED = 64 * MIB  # a probe's finest answer


class Slabs:
    """``slots`` places of ``slot_bytes``, each starting on a page. The first ``pinned_slots`` are
    pinned. Several threads may use different slots; `close` is for one."""

    def __init__(
        self, device: Device, slots: int, slot_bytes: int, *, block_bytes: int = BLOCK
    ) -> None:
        """``block_bytes``: at most so much is pinned at once, but a slot at least."""
        self.slots, self.slot_bytes = slots, slot_bytes
        self._device = device
        step = -(-slot_bytes // PAGE) * PAGE
        self.nbytes = slots * step
        self._blocks, refusal = _pin(device, slots, step, max(1, block_bytes // step))
        self._places = [row for block in self._blocks for row in block.view(-1, step).unbind()]
        self.pinned_slots = len(self._places)
        self._rest: Arena | None = None
        if self.pinned_slots < slots:
            self._rest = Arena(slots - self.pinned_slots, step)
            self._places += self._rest.tensor.view(-1, step).unbind()
        self.addresses = [place.data_ptr() for place in self._places]
        self.note = refusal and _note(self.pinned_slots * step, self.nbytes, refusal)

    def view(self, slot: int) -> torch.Tensor:
        """uint8 [slot_bytes], in host memory."""
        return self._places[slot].narrow(0, 0, self.slot_bytes)

    def is_pinned(self, slot: int) -> bool:
        """Whether the device can read the slot by its address, and copies from it let the host go
        on."""
        return slot < self.pinned_slots

    def close(self) -> None:
        """Give the memory back; no copy may be under way. A tensor that somebody still holds over
        it stays readable memory, but its bytes may be lost."""
        self._places = []
        for block in self._blocks:
            self._device.unpin(block)
        self._blocks = []
        if self._rest is not None:
            self._rest.close()
            self._rest = None


@dataclass(frozen=True, slots=True)
class Pinnable:
    """What a probe found: ``nbytes`` could be pinned, in ``seconds``; ``refusal`` is what the
    system said to more, None if it said nothing."""

    nbytes: int
    seconds: float
    refusal: str | None


def probe(device: Device, limit: int) -> Pinnable:
    """Pin ever more, in steps of `PROBED` and ``limit`` bytes at most, and release it again.
    ``limit`` must be free memory: where pages exceed what there is, systems kill before a driver
    refuses."""
    grain = min(PROBED, limit)
    started = time.perf_counter()
    blocks, refusal = _pin(device, limit // grain if grain else 0, grain, 1, grow=True)
    seconds = time.perf_counter() - started
    for block in blocks:
        device.unpin(block)
    return Pinnable(sum(block.numel() for block in blocks), seconds, refusal)


def _pin(
    device: Device, count: int, size: int, most: int, *, grow: bool = False
) -> tuple[list[torch.Tensor], str | None]:
    """Pin ``count`` times ``size`` bytes, ``most`` of them in a block; halve the block where the
    system refuses, down to one. ``grow``: double it until then. With what the system said, if some
    are left."""
    blocks: list[torch.Tensor] = []
    refusal = None
    try:
        while count and most:
            block = min(count, most)
            try:
                blocks.append(device.pin(block * size))
            except PinningRefused as error:
                refusal, most = str(error), block // 2
            else:
                count -= block
                most = most * 2 if grow and refusal is None else most
    except BaseException:  # Ctrl-C, while gigabytes are pinned
        for pinned in blocks:
            device.unpin(pinned)
        raise
    return blocks, refusal if count else None


def _note(pinned: int, wanted: int, refusal: str) -> str:
    return (
        f"{pinned / GIB:.2f} of {wanted / GIB:.2f} GiB of host memory are pinned ({refusal}); "
        "copies from the rest are slower and hold up the host. "
        f"{memlock_advice()}, or use a smaller --memory"
    )


def memlock_advice() -> str:
    """What a user can do about a refusal."""
    limit = memlock_limit()
    if limit is None:
        return "Nothing limits locked memory here, so the driver or a container does: free memory"
    return (
        f"Locked memory is limited to {limit / MIB:.0f} MiB here: raise it with "
        "`ulimit -l unlimited` (containers: --ulimit memlock=-1)"
    )


def memlock_limit() -> int | None:
    """Bytes that this process may lock, where the system limits that. Drivers need not care."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft
