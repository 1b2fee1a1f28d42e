"""The host tier under a device: experts in pinned slabs, laid as in the device; disk beneath.

Knows: slabs, who is in which, the reading threads. Does not know: which expert is needed on the
device or when (queue), nor the device's slots.

An expert is read into a staging slot as it lies on disk, and packed into its slab once; from there
on one copy moves it. Where host memory holds fewer slabs than there are experts, the least recently
used one gives way, unless a copy out of it is still under way.
"""

from __future__ import annotations

import queue
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from understudy.core import ExpertId
from understudy.experts.device import Event
from understudy.experts.device.pinned import Slabs
from understudy.experts.device.slab import Slab
from understudy.experts.store import Store

BLOCK = 2 << 20  # bytes per read

Then = Callable[[ExpertId, BaseException | None], None]


class HostTier:
    """``store``: the disk, with one staging slot per reading thread. Its methods are called by one
    thread at a time; ``then`` of `request` is called by a reading thread."""

    def __init__(self, store: Store, slabs: Sequence[Slab], memory: Slabs, threads: int) -> None:
        self.store, self.slabs, self.memory = store, slabs, memory
        self._free = list(range(memory.slots - 1, -1, -1))
        self._where: OrderedDict[ExpertId, int] = OrderedDict()  # least recently used first
        self._reading: set[ExpertId] = set()
        self._leaving: dict[ExpertId, Event] = {}  # the last copy out of a slab
        self._staging: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(threads):
            self._staging.put(slot)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="understudy-host")

    def __contains__(self, expert: ExpertId) -> bool:
        """Whether its bytes are here now."""
        return expert in self._where and expert not in self._reading

    @property
    def holds_all(self) -> bool:
        return self.memory.slots >= len(self.store.layouts)

    def take(self, expert: ExpertId) -> torch.Tensor:
        """The slab of an expert that is here: what a copy to the device reads."""
        self._where.move_to_end(expert)
        return self.memory.view(self._where[expert])[: self.slabs[expert.layer].nbytes]

    def leaving(self, expert: ExpertId, copied: Event) -> None:
        """Its slab is read until ``copied``."""
        if not self.holds_all:
            self._leaving[expert] = copied

    def address(self, expert: ExpertId) -> int:
        """Where its slab lies, for a device that reads host memory by itself."""
        return self.memory.addresses[self._where[expert]]

    @property
    def has_room(self) -> bool:
        """Whether one more may be requested: not all slabs are being read into."""
        return bool(self._free) or len(self._reading) < len(self._where)

    def request(self, expert: ExpertId, then: Then) -> None:
        """Read an expert that is not here; there must be room. ``then(expert, error)`` when it is,
        or could not be."""
        if expert in self._reading:
            return
        slab = self._free.pop() if self._free else self._make_room()
        self._where[expert] = slab
        self._reading.add(expert)
        self._threads.submit(self._read, expert, slab, then)

    def arrived(self, expert: ExpertId, error: BaseException | None) -> None:
        """To be called once after each `request`, when ``then`` was."""
        self._reading.discard(expert)
        if error is not None:
            self._free.append(self._where.pop(expert))

    def fill(self, experts: Iterable[ExpertId], say: Callable[[int], None]) -> None:
        """Read these and wait; ``say`` how many are here. Nobody else may wait for a read. Raises
        what the first failure raised."""
        landed: queue.SimpleQueue[tuple[ExpertId, BaseException | None]] = queue.SimpleQueue()
        wanted = deque(e for e in experts if e not in self)
        under_way = count = 0
        failure: BaseException | None = None
        while wanted or under_way:
            while wanted and self.has_room:
                self.request(wanted.popleft(), lambda e, error: landed.put((e, error)))
                under_way += 1
            expert, error = landed.get()
            self.arrived(expert, error)
            failure, count, under_way = failure or error, count + 1, under_way - 1
            say(count)
        if failure is not None:
            raise failure

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self.store.close()
        self.memory.close()

    def _make_room(self) -> int:
        """The slab of the least recently used expert; waits for a copy only if all are leaving."""
        resting = [e for e in self._where if e not in self._reading]
        victim = next((e for e in resting if self._at_rest(e)), None)
        if victim is None:
            victim = resting[0]
            self._leaving.pop(victim).synchronize()
        return self._where.pop(victim)

    def _at_rest(self, expert: ExpertId) -> bool:
        copied = self._leaving.get(expert)
        if copied is not None and copied.done():
            del self._leaving[expert]
            copied = None
        return copied is None

    def _read(self, expert: ExpertId, slab: int, then: Then) -> None:
        staging = self._staging.get()
        error: BaseException | None = None
        try:
            for chunk in self.store.chunks(expert, staging, BLOCK):
                self.store.disk.read(chunk)
            for file in self.store.files_of(expert):
                self.store.disk.check(file)
            weights = self.store.weights(expert, staging)
            self.slabs[expert.layer].pack(weights, self.memory.view(slab))
        except BaseException as e:
            error = e
        finally:
            self._staging.put(staging)
        then(expert, error)
