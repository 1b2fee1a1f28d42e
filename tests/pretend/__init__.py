"""A device that is not there: its memory is the CPU's, its copies happen as late as fences allow.

Knows: the words of `experts.device`, and how real hardware punishes a missing fence. Does not know:
experts, slots, models.

Three ways in which a missing fence shows itself:

* memory is 0xFF (NaN in any float format) until something was copied there, and copies happen only
  when a fence demands them: who does not wait computes with NaN
* the source of a copy is read when the copy happens: who overwrites it early copies wrong bytes,
  and where the source is pinned (elsewhere nothing tells host memory from a device's), it is told
* a happens-before check (`races`) raises `Race` where two pieces of work touch the same bytes
  unordered, also where the order that happened to be taken here went well

The host is one participant, whatever its threads: they hand work to each other under locks that
this device does not see. Writes of the host and of kernels are not announced to a device, so the
third way does not see them; the first two do.
"""

from __future__ import annotations

import mmap
import random
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pretend.graph import PretendGraph
from pretend.races import Clock, Ledger, Race, Sources, caller, extent, overlap
from pretend.streams import NotRecordable, PretendEvent, PretendStream
from understudy.experts.device import DeviceFull, Graph, PinningRefused

__all__ = ["NotRecordable", "Pretend", "PretendEvent", "PretendGraph", "PretendStream", "Race"]

MIB = 1 << 20
PROGRESS = 0.25  # how likely a piece of queued work is done early, whenever anything is asked
LAUNCH_SECONDS = 1e-5


class Pretend:
    """See `experts.device.Device`.

    For tests: ``waits`` counts how often the host waited and ``launches`` kernels; ``copied_bytes``
    adds up; ``pinned`` and ``pinned_bytes`` are what is pinned now, ``queued()`` how much work
    nobody demanded yet. ``bandwidth`` [B/s] is what timed events show of copies."""

    index = 0
    name = "pretended device"
    torch_device = torch.device("cpu")

    def __init__(
        self,
        *,
        memory: int = 64 * MIB,
        seed: int = 0,
        bandwidth: float = 25e9,
        full_after: int | None = None,
        refuse_pinning_after: int | None = None,
    ) -> None:
        """``full_after``: bytes after which `allocate` fails although more is said to be free.
        ``refuse_pinning_after``: bytes that the system lets us pin."""
        self.random = random.Random(seed)
        self.lock = threading.RLock()
        self.bandwidth = bandwidth
        self.waits = self.launches = self.copied_bytes = 0
        self.host = Clock()
        self.ledger, self.sources = Ledger(self.where), Sources(self.where)
        self.recordings: dict[int, PretendGraph] = {}  # by thread
        self._total, self._used = memory, 0
        self._full_after, self._refuse_after = full_after, refuse_pinning_after
        self._names: dict[int, tuple[int, str]] = {}  # start -> (nbytes, name)
        self._allocations = 0
        self._pinned: dict[int, torch.Tensor] = {}
        self._streams: list[PretendStream] = []
        self._in_use = threading.local()
        self._default = self.named_stream("the compute stream")
        self._default.in_use = 1

    # ------------------------------------------------------------------------------------- streams

    @property
    def compute(self) -> PretendStream:
        return self.stack[-1] if self.stack else self._default

    def stream(self, *, urgent: bool = False) -> PretendStream:
        return self.named_stream(f"{'urgent ' if urgent else ''}stream {len(self._streams)}")

    def fetch(self, *tensors: torch.Tensor) -> list[Any]:
        with self.lock:
            self.refuse_while_recording("to fetch")
            self.waits += 1
            self.progress()
            self.learn(self.compute.record().clock)
            return [tensor.tolist() for tensor in tensors]

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        self.fetch()
        return tensor.clone()

    def send(self, values: torch.Tensor) -> torch.Tensor:
        """Host memory is this device's memory."""
        return values.clone()

    def reads(self, memory: torch.Tensor) -> None:
        with self.lock:
            self.compute.reads(memory)

    def launch(self, kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
        """A kernel under Triton's interpreter, or any function, called as
        ``kernel(grid, *args, **options)``."""
        with self.lock:
            stream = self.compute
            if stream.recording is not None:
                stream.recording.asked_launch(stream, kernel, tuple(grid), args, options)
                return
            self.launches += 1
            stream.seconds += LAUNCH_SECONDS
        if hasattr(type(kernel), "__getitem__"):
            kernel[tuple(grid)](*args, **options)
        else:
            kernel(tuple(grid), *args, **options)

    def graph(self, shares: Graph | None = None) -> PretendGraph:
        assert shares is None or isinstance(shares, PretendGraph)
        if shares is not None and not shares.recorded:
            raise NotRecordable("shares the memory of a graph that was not recorded yet")
        return PretendGraph(self)

    def queued(self) -> int:
        """Pieces of work that are asked for and not done."""
        return sum(len(stream.queue) for stream in self._streams)

    # -------------------------------------------------------------------------------------- memory

    def free_bytes(self) -> int:
        return self._total - self._used

    def total_bytes(self) -> int:
        return self._total

    def allocate(self, nbytes: int) -> torch.Tensor:
        with self.lock:
            self.refuse_while_recording("to allocate")
            full = self._full_after is not None and self._used + nbytes > self._full_after
            if full or nbytes > self.free_bytes():
                raise DeviceFull(
                    f"{self.name} has {self.free_bytes() / MIB:.4g} MiB free, and "
                    f"{nbytes / MIB:.4g} MiB were asked for; use a smaller --device-memory"
                )
            self._used += nbytes
            self._allocations += 1
            return self._pages(nbytes, f"device memory {self._allocations}", on_device=True)

    def free(self, memory: torch.Tensor) -> None:
        """What is read from then on is NaN."""
        with self.lock:
            for access in self.ledger.touching(*extent(memory)):
                raise Race(f"freed at {caller()}, and {access.what} may still be under way")
            start = memory.data_ptr()
            nbytes, name = self._names[start]
            self._names[start] = 0, f"{name}, which was freed"
            self._used -= nbytes
            memory.fill_(0xFF)

    def pin(self, nbytes: int) -> torch.Tensor:
        with self.lock:
            self.refuse_while_recording("to pin")
            refuse = self._refuse_after
            if refuse is not None and self.pinned_bytes + nbytes > refuse:
                raise PinningRefused(f"the system refuses to pin {nbytes / MIB:.4g} MiB")
            memory = self._pages(nbytes, f"pinned memory {len(self._pinned) + 1}", on_device=False)
            self._pinned[memory.data_ptr()] = memory
            return memory

    def unpin(self, memory: torch.Tensor) -> None:
        with self.lock:
            if memory.data_ptr() not in self._pinned:
                return
            for access in self.ledger.touching(*extent(memory)):
                raise Race(f"unpinned at {caller()}, and {access.what} may still be under way")
            del self._pinned[memory.data_ptr()]

    @property
    def pinned(self) -> list[torch.Tensor]:
        return list(self._pinned.values())

    @property
    def pinned_bytes(self) -> int:
        return sum(memory.numel() for memory in self._pinned.values())

    # ------------------------------------------------------------------------- within this package

    @property
    def stack(self) -> list[PretendStream]:
        """Streams in use by this thread, the last one on top."""
        if not hasattr(self._in_use, "stack"):
            self._in_use.stack = []
        stack: list[PretendStream] = self._in_use.stack
        return stack

    def named_stream(self, name: str) -> PretendStream:
        with self.lock:
            self._streams.append(PretendStream(self, len(self._streams), name))
            return self._streams[-1]

    def progress(self) -> None:
        """Some queued work happens earlier than it must, in an order nobody should count on."""
        while self._streams and self.random.random() < PROGRESS:
            self.random.choice(self._streams).step()

    def drain(self) -> None:
        """The host waits for everything."""
        self.waits += 1
        for stream in self._streams:
            self.learn(stream.record().clock)
            stream.perform()

    def learn(self, clock: Clock) -> None:
        """The host knows that so much is over."""
        self.host.join(clock)
        self.ledger.forget(self.host)
        self.sources.forget(self.host)

    def refuse_while_recording(self, what: str) -> None:
        graph = self.recordings.get(threading.get_ident())
        if graph is not None:
            graph.refuse(what)

    def require_recording(self, graph: PretendGraph | None) -> PretendGraph:
        """The graph under way in this thread, to which an event of ``graph`` means something."""
        mine = self.recordings.get(threading.get_ident())
        if mine is None:
            raise NotRecordable("an event of a recording means nothing after its end")
        if mine is not graph:
            mine.refuse("to wait for work outside the recording")
        return mine

    def is_pinned(self, memory: torch.Tensor) -> bool:
        return any(overlap(extent(memory), extent(p)) for p in self._pinned.values())

    def where(self, start: int, end: int) -> str:
        """For people."""
        for first, (nbytes, name) in self._names.items():
            if first <= start < first + nbytes:
                return f"{name}, bytes {start - first}..{end - first}"
        return f"memory of torch, {end - start} bytes at {start:#x}"

    def _pages(self, nbytes: int, name: str, *, on_device: bool) -> torch.Tensor:
        pages = np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), dtype=np.uint8)[:nbytes]
        pages.fill(0xFF)
        memory = torch.from_numpy(pages)
        self._names[memory.data_ptr()] = (nbytes, name)
        freed = weakref.finalize(pages, self._freed, memory.data_ptr(), on_device)
        freed.atexit = False
        return memory

    def _freed(self, start: int, on_device: bool) -> None:
        """Nobody holds a tensor there any more: its address may become something else's."""
        nbytes, _ = self._names.pop(start)
        self._used -= nbytes if on_device else 0
