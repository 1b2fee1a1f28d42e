"""The queue between host memory and device slots: demand before speculation, metered.

Knows: jobs (expert + slot), streams and events, the host tier. Does not know: who should be loaded
or leave; it asks `place` for a slot at the moment a speculation is issued.

What `TransferQueue` is to the disk, without threads of its own: copies are asked of a stream and
done by the device. Every method is called with the lock held, except `close`. Rules:

* a demand is asked for at once, on a stream of its own; `wait` lands the oldest ones *in the order
  of the compute stream*: the device waits for the copy, the host goes on
* speculation is asked of a second stream, behind the demands asked for so far, and never more than
  ``most`` bytes of it are under way, so that a demand never waits long behind one. Not so for a
  prompt: it needs most experts of the next layer, which come while this one's are computed
* a speculation takes its slot when it is issued; queued ones are replaced by the next plan; one
  whose bytes are not in host memory would come too late and is left out
* a demand for a speculation under way makes it a demand; one expert is never copied twice at once
* an expert that is not in host memory is read from disk first; a failed read raises in the forward
  that waits for it
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from understudy.core import ExpertId, Guess, UnderstudyError
from understudy.experts.device import Device, Event, Stream
from understudy.experts.device.host import HostTier
from understudy.experts.device.slots import DeviceSlots
from understudy.experts.transfer import Meter
from understudy.policies.residency import Residency, Slot

GROUP = 64 << 20  # bytes that are landed together: a prompt's experts are computed as they come
PATIENCE = 0.2  # seconds between looks at whether the model was closed
SPECULATION = 32 << 20  # bytes of speculation under way, where nobody measured


@dataclass(slots=True, eq=False)
class _Job:
    """``landed`` is ``None`` while the bytes are not in host memory yet."""

    expert: ExpertId
    slot: int
    speculative: bool
    nbytes: int
    landed: Event | None = None


class DeviceQueue:
    """See the head of this file."""

    def __init__(
        self,
        book: Residency,
        *,
        device: Device,
        slots: DeviceSlots,
        host: HostTier,
        lock: threading.RLock,
        place: Callable[[Guess], Slot | None],
        forget: Callable[[ExpertId, int], None],
        most: int = SPECULATION,
    ) -> None:
        self.book, self.device, self.slots, self.host, self.lock = book, device, slots, host, lock
        self._place, self._forget, self._most = place, forget, most
        self.meter = Meter()
        self.cancelled = 0
        self._watch = _Watch()
        self._urgent, self._patient = device.stream(urgent=True), device.stream()
        self._came = threading.Condition(lock)  # bytes came from disk
        self._from_disk: list[tuple[ExpertId, BaseException | None]] = []
        self._unread: deque[_Job] = deque()  # demands whose bytes nobody has asked the disk for
        self._demands: deque[_Job] = deque()
        self._speculations: deque[_Job] = deque()
        self._guesses: deque[Guess] = deque()
        self._jobs: dict[ExpertId, _Job] = {}
        self._errors: dict[ExpertId, BaseException] = {}
        self._last_demand: Event | None = None
        self._sweeping = False  # the last demands were a prompt's
        self._stop = False

    # ------------------------------------------------------------------------ asked by the runtime

    def demand_all(
        self, loads: Sequence[tuple[ExpertId, Slot]], *, as_they_lie: bool = False
    ) -> None:
        """Bring each expert into its reserved slot, in this order. Those in host memory are copied
        first: room for the others may be made at their expense."""
        self.require_open()
        self._sweeping = as_they_lie
        jobs = [self._job(expert, slot, speculative=False) for expert, slot in loads]
        self._demands.extend(jobs)
        here = [job for job in jobs if job.expert in self.host]
        self._copy_all(here, self._urgent)
        for job in jobs:
            self._errors.pop(job.expert, None)  # of a forward that was interrupted before it saw it
            if job.landed is None:
                self._unread.append(job)
        self._ask_disk()

    def promote(self, expert: ExpertId) -> None:
        """Somebody needs a speculation that is under way: from now on it is a demand."""
        job = self._jobs.get(expert)
        if job is not None and job.speculative:
            job.speculative = False
            self._speculations.remove(job)
            self._demands.appendleft(job)

    def speculate(self, guesses: Sequence[Guess]) -> None:
        """Replace all queued speculation (not what is under way)."""
        self.cancelled += len(self._guesses)
        self._guesses = deque(guesses)
        self._issue()

    def take_error(self, expert: ExpertId) -> BaseException | None:
        """Why the demand for ``expert`` failed, once; ``None`` if it did not."""
        return self._errors.pop(expert, None)

    def tend(self) -> None:
        """Note what has landed, and use the room that it leaves."""
        self._take_from_disk()
        while self._speculations and _is_done(self._speculations[0]):
            self._land(self._speculations.popleft())
        self._watch.settle(self.meter)
        self._issue()

    def wait(self, timeout: float | None = None) -> bool:
        """Land the oldest demands that have been asked for; the compute stream will wait for them.
        Sleeps only where all bytes are still on their way from disk."""
        self.require_open()
        self._take_from_disk()
        group, nbytes = [], 0
        while self._demands and nbytes < GROUP:
            job = next((j for j in self._demands if j.landed is not None), None)
            if job is None:
                break
            self._demands.remove(job)
            group.append(job)
            nbytes += job.nbytes
        if not group and self._speculations:  # somebody waits for the slot of one
            group.append(self._speculations.popleft())
        if not group:
            return not self._demands or self._came.wait(timeout)
        self._watch.stall(self.device.compute, [job.landed for job in group])
        for job in group:
            self._land(job)
        return True

    def settle(self) -> None:
        """Wait until nothing is under way and nothing is queued."""
        self._guesses.clear()
        while self._jobs:
            for jobs in (self._speculations, self._demands):
                for job in list(jobs):
                    if job.landed is not None:
                        job.landed.synchronize()
                        jobs.remove(job)
                        self._land(job)
            if self._jobs:  # on their way from disk
                self.wait(None)
        self._watch.settle(self.meter)

    def require_open(self) -> None:
        """Raise if nothing will ever be copied again."""
        if self._stop:
            raise UnderstudyError("this model was closed; load it again to use it")

    @property
    def busy(self) -> bool:
        """Whether a demand has not landed yet."""
        return bool(self._demands)

    @property
    def queued(self) -> int:
        return len(self._demands)

    @property
    def stalled(self) -> float:
        return self._watch.stalled

    def close(self) -> None:
        """Nothing is asked for any more; what is under way ends first. Host memory stays: the
        device may still compute from it."""
        with self.lock:
            self._stop = True
            self._guesses.clear()
            last = [stream.record() for stream in (self._urgent, self._patient)]
            self._came.notify_all()
        for event in last:
            event.synchronize()

    # ---------------------------------------------------------------------------------- the copies

    def _job(self, expert: ExpertId, slot: Slot, *, speculative: bool) -> _Job:
        nbytes = self.slots.slabs[expert.layer].nbytes
        job = self._jobs[expert] = _Job(expert, slot.index, speculative, nbytes)
        return job

    def _copy_all(self, jobs: Sequence[_Job], stream: Stream) -> None:
        """Ask for these copies, timed together: between two of them the link does not rest."""
        if not jobs:
            return
        for job in jobs:
            self.slots.claim(stream, job.slot)
        started = stream.record(timed=True)
        for job in jobs:
            source = self.host.take(job.expert)
            self.book.launch(job.expert)
            job.landed = self.slots.copy_in(stream, job.expert, job.slot, source)
            self.host.leaving(job.expert, job.landed)
        last = stream.record(timed=True)
        self._watch.copied(started, last, sum(job.nbytes for job in jobs))
        if stream is self._urgent:
            self._last_demand = last

    def _land(self, job: _Job) -> None:
        del self._jobs[job.expert]
        self.book.land(job.expert)

    def _issue(self) -> None:
        """Speculation into what the demands leave of the link."""
        under_way = sum(job.nbytes for job in self._speculations)
        jobs = []
        while self._guesses and (self._sweeping or under_way < self._most):
            guess = self._guesses.popleft()
            slot = self._place(guess) if guess.expert in self.host else None
            if slot is not None:
                jobs.append(self._job(guess.expert, slot, speculative=True))
                under_way += jobs[-1].nbytes
        if jobs and self._last_demand is not None:
            self._patient.wait(self._last_demand)
        self._copy_all(jobs, self._patient)
        self._speculations.extend(jobs)

    # ------------------------------------------------------------------------------------ the disk

    def read(self, expert: ExpertId) -> None:
        """Bring an expert to host memory and no further; the host waits. Called without the lock.
        Raises what the disk raised."""
        asked = False
        with self.lock:
            while True:
                self._take_from_disk()
                error = self._errors.pop(expert, None)
                if error is not None:
                    raise error
                if expert in self.host:
                    return
                self.require_open()
                if not asked and self.host.has_room:
                    self.host.request(expert, self._read)
                    asked = True
                self._came.wait(PATIENCE)

    def _ask_disk(self) -> None:
        while self._unread and self.host.has_room:
            job = self._unread.popleft()
            self.host.request(job.expert, self._read)

    def _read(self, expert: ExpertId, error: BaseException | None) -> None:
        """Called by a reading thread: the bytes of ``expert`` came, or cannot be had."""
        with self.lock:
            self._from_disk.append((expert, error))
            self._came.notify_all()

    def _take_from_disk(self) -> None:
        came, self._from_disk = self._from_disk, []
        for expert, error in came:
            self.host.arrived(expert, error)
            job = self._jobs.get(expert)  # None: it goes no further than host memory
            if error is not None:
                self._errors[expert] = error
            if job is not None and error is None:
                self._copy_all([job], self._urgent)
            elif job is not None:
                del self._jobs[expert]
                self._demands.remove(job)
                self._forget(expert, job.nbytes)
        if came:
            self._ask_disk()


def _is_done(job: _Job) -> bool:
    return job.landed is not None and job.landed.done()


class _Watch:
    """What only the device's clock can tell: how long copies took, how long compute waited."""

    def __init__(self) -> None:
        self.stalled = 0.0
        self._copies: deque[tuple[Event, Event, int]] = deque()
        self._stalls: deque[tuple[Event, Event]] = deque()

    def copied(self, started: Event, landed: Event, nbytes: int) -> None:
        self._copies.append((started, landed, nbytes))

    def stall(self, compute: Stream, landings: Sequence[Event | None]) -> None:
        """The compute stream waits for all of these now."""
        flying = [landed for landed in landings if landed is not None and not landed.done()]
        if not flying:
            return
        before = compute.record(timed=True)
        for landed in flying:
            compute.wait(landed)
        self._stalls.append((before, compute.record(timed=True)))

    def settle(self, meter: Meter) -> None:
        """Book what is over."""
        while self._copies and self._copies[0][1].done():
            started, landed, nbytes = self._copies.popleft()
            meter.nbytes += nbytes
            meter.busy += landed.seconds_since(started)
        while self._stalls and self._stalls[0][1].done():
            before, after = self._stalls.popleft()
            self.stalled += after.seconds_since(before)
