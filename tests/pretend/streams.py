"""Streams whose copies happen late: not when they are asked for, but when a fence demands them.

Knows: order within a stream, and between streams where events say so. Does not know: graphs, beyond
handing them what is asked of a stream that is being recorded.

Torch does its work at once on the CPU. So a stream in use (the compute stream, and any stream
inside ``with``) has nothing queued: what it must wait for is done when it is told to wait. Every
other stream keeps a queue.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils._python_dispatch import _disable_current_modes

from pretend.races import Access, Clock, Sources, caller, extent
from understudy.experts.device import Event

if TYPE_CHECKING:
    from pretend import Pretend
    from pretend.graph import PretendGraph

EVENT_SECONDS = 1e-6  # no two events at the same time: rates stay finite
PATIENCE = 3  # an event says "not yet" fewer times than this


class NotRecordable(RuntimeError):
    """What the driver refuses while a graph is recorded, or for work that belongs to a graph."""


class PretendEvent:
    def __init__(self, stream: PretendStream, *, timed: bool) -> None:
        self.stream, self.timed = stream, timed
        self.clock = Clock(stream.clock)
        stream.seconds += EVENT_SECONDS
        self.seconds = stream.seconds
        self.graph: PretendGraph | None = stream.recording
        self.passed = False
        self._not_yet = stream.device.random.randrange(PATIENCE)

    def done(self) -> bool:
        device = self.stream.device
        with device.lock:
            self._require_real()
            if not device.host.covers(self.clock):
                device.progress()
                if self._not_yet:
                    self._not_yet -= 1
                    return False
                self.demand()
                device.learn(self.clock)
            return True

    def synchronize(self) -> None:
        device = self.stream.device
        with device.lock:
            self._require_real()
            device.waits += 1
            self.demand()
            device.learn(self.clock)

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, PretendEvent)
        for event in (earlier, self):
            if not event.timed:
                raise RuntimeError("this event was recorded without timed=True")
            if not event.stream.device.host.covers(event.clock):
                raise RuntimeError("this event is not known to be done")
        return self.seconds - earlier.seconds

    def demand(self) -> None:
        """Do everything that comes before this event."""
        if not self.passed:
            self.stream.perform(until=self)

    def ready(self) -> bool:
        return True

    def perform(self) -> None:
        self.passed = True

    def _require_real(self) -> None:
        self.stream.device.refuse_while_recording("to ask the host about an event")
        if self.graph is not None:
            raise NotRecordable("an event of a recording: the host can not ask about it")


@dataclass(slots=True, eq=False)
class _Wait:
    event: PretendEvent

    def ready(self) -> bool:
        return self.event.passed

    def perform(self) -> None:
        self.event.demand()


@dataclass(slots=True, eq=False)
class _Copy:
    sources: Sources
    to: torch.Tensor
    source: torch.Tensor
    reading: Access

    def ready(self) -> bool:
        return True

    def perform(self) -> None:
        """The source is read now and not earlier."""
        with _disable_current_modes(), torch.inference_mode():
            self.sources.check(self.reading)
            self.to.copy_(self.source)
            self.sources.written(*extent(self.to))


class PretendStream:
    def __init__(self, device: Pretend, number: int, name: str) -> None:
        self.device, self.number, self.name = device, number, name
        self.clock = Clock()
        self.seconds = 0.0
        self.in_use = 0
        self.recording: PretendGraph | None = None
        self.queue: deque[PretendEvent | _Wait | _Copy] = deque()

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        if to.shape != source.shape or to.dtype != source.dtype:
            raise ValueError(
                f"copy of {source.dtype} {tuple(source.shape)} to {to.dtype} {tuple(to.shape)}"
            )
        with self.device.lock:
            if self.recording is not None:
                self.recording.asked_copy(self, to, source)
                return
            self.device.progress()
            self._tick()
            reading = self._touch(source, False, f"read by the copy of {self.name} at {caller()}")
            self._touch(to, True, f"the copy of {self.name} at {caller()}")
            if self.device.is_pinned(source):
                self.device.sources.enter(reading)
            nbytes = source.numel() * source.element_size()
            self.seconds += nbytes / self.device.bandwidth
            self.device.copied_bytes += nbytes
            self._ask(_Copy(self.device.sources, to, source, reading))

    def wait(self, event: Event) -> None:
        assert isinstance(event, PretendEvent)
        with self.device.lock:
            if self.recording is not None or event.graph is not None:
                self.device.require_recording(event.graph).asked_wait(self, event)
                return
            self.device.progress()
            self.follow(event)
            self._ask(_Wait(event))

    def record(self, *, timed: bool = False) -> PretendEvent:
        with self.device.lock:
            self.clock.join(self.device.host)
            event = PretendEvent(self, timed=timed)
            if self.recording is not None:
                self.recording.asked_event(self, event)
            else:
                self._ask(event)
            return event

    def reads(self, memory: torch.Tensor) -> None:
        """See `Device.reads`; here of any stream."""
        if self.recording is not None:
            self.recording.asked_read(self, memory)
            return
        self._tick()
        self._touch(memory, False, f"what {self.name} reads at {caller()}")

    def __enter__(self) -> PretendStream:
        with self.device.lock:
            self.device.stack.append(self)
            self.in_use += 1
            self.perform()
        return self

    def __exit__(self, *exc: object) -> None:
        with self.device.lock:
            assert self.device.stack.pop() is self
            self.in_use -= 1

    # ------------------------------------------------------------------------- within this package

    def follow(self, event: PretendEvent) -> None:
        """From now on, what is asked of this stream is known to come after ``event``."""
        self.clock.join(event.clock)
        self.seconds = max(self.seconds, event.seconds)

    def perform(self, until: PretendEvent | None = None) -> None:
        """Do what is queued, in order."""
        while self.queue:
            work = self.queue.popleft()
            work.perform()
            if work is until:
                return

    def step(self) -> None:
        """Do the first thing queued, if nothing holds it up."""
        if self.queue and self.queue[0].ready():
            self.queue.popleft().perform()

    def _ask(self, work: PretendEvent | _Wait | _Copy) -> None:
        self.queue.append(work)
        if self.in_use:
            self.perform()

    def _tick(self) -> None:
        self.clock.join(self.device.host)
        self.clock[self.number] = self.clock.get(self.number, 0) + 1

    def _touch(self, memory: torch.Tensor, writes: bool, what: str) -> Access:
        access = Access(memory, self.number, self.clock[self.number], writes, what)
        self.device.ledger.enter(access, self.clock)
        return access
