"""The queue between disk and slots: demand before speculation, metered.

Knows: jobs (expert + slot), their chunks, worker threads, the clock. Does not know: who should be
loaded or leave; it asks `place` for a slot at the moment a speculation is issued.

One lock guards the residency book and this queue. Workers hold it only between reads. Two things
are waited for: work (by workers) and landings (by whoever computes). Rules:

* a demand goes before all speculation, chunk by chunk; speculation starts only when no demand is
  queued or under way, in chunks of at most 2 MiB, `SPECULATION_READS` at a time, so that a demand
  never waits long behind one
* a speculation takes its slot when it is issued, not when it is queued; queued ones are replaced by
  the next plan
* a speculation whose layer came and did not need it is given up: the rest is not read
* a demand for a speculation under way makes it a demand; one expert is never read twice at once
* a failed speculation is forgotten; a failed demand raises in the forward that waits for it
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from understudy.core import ExpertId, Guess, UnderstudyError
from understudy.experts.store import Chunk, Store
from understudy.policies.residency import Residency, Slot

DEMAND_BLOCK = 2 << 20
SPECULATION_BLOCK = 2 << 20
SPECULATION_READS = 2  # as many as saturate the link; all of them delay a demand that comes now


class Transfer(Protocol):
    """What the runtime needs of whoever brings experts. Every method is called with the lock held,
    except `close`. ``stalled``: seconds of stall that the host did not see, because the device
    waited alone. ``cancelled``: speculations given up before they were issued."""

    cancelled: int

    @property
    def stalled(self) -> float: ...
    @property
    def meter(self) -> Meter: ...
    @property
    def queued(self) -> int: ...
    def demand_all(
        self, loads: Sequence[tuple[ExpertId, Slot]], *, as_they_lie: bool = False
    ) -> None: ...
    def promote(self, expert: ExpertId) -> None: ...
    def speculate(self, guesses: Sequence[Guess]) -> None: ...
    def take_error(self, expert: ExpertId) -> BaseException | None: ...
    def tend(self) -> None:
        """Note what has landed, where nobody else does."""

    def wait(self, timeout: float | None = None) -> bool: ...
    def settle(self) -> None: ...
    def require_open(self) -> None: ...
    def close(self) -> None: ...


class Source(Protocol):
    """What a queue needs of a store; tests bring their own."""

    def chunks(self, expert: ExpertId, slot: int, block: int) -> list[Chunk]: ...
    def read(self, chunk: Chunk) -> None: ...
    def verify(self, expert: ExpertId) -> None: ...


class StoreSource:
    """The real one: chunks come from disk, and the file is checked after an expert's last byte."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.chunks = store.chunks
        self.read = store.disk.read

    def verify(self, expert: ExpertId) -> None:
        for file in self._store.files_of(expert):
            self._store.disk.check(file)


@dataclass(slots=True, eq=False)
class _Job:
    expert: ExpertId
    chunks: deque[Chunk]
    speculative: bool
    unread: int  # bytes not arrived yet
    launched: bool = False
    outstanding: int = 0  # chunks under way
    error: BaseException | None = None


@dataclass(slots=True)
class Meter:
    """Bytes and busy time of the link, since the start."""

    nbytes: int = 0
    busy: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    _active: int = 0
    _since: float = 0.0

    def begin(self) -> None:
        if self._active == 0:
            self._since = time.perf_counter()
        self._active += 1

    def end(self, nbytes: int) -> None:
        self._active -= 1
        self.nbytes += nbytes
        if self._active == 0:
            self.busy += time.perf_counter() - self._since

    @property
    def bandwidth(self) -> float:
        """Bytes per second while anything was under way."""
        return self.nbytes / self.busy if self.busy else 0.0

    @property
    def idle(self) -> float:
        """Share of the time with nothing under way, 0..1."""
        elapsed = time.perf_counter() - self.started
        return max(0.0, 1 - self.busy / elapsed) if elapsed > 0 else 0.0


class TransferQueue:
    """See the head of this file. Every method is called with ``lock`` held, except `close`."""

    def __init__(
        self,
        book: Residency,
        source: Source,
        *,
        lock: threading.RLock,
        place: Callable[[Guess], Slot | None],
        forget: Callable[[ExpertId, int], None],
        wanted: Callable[[ExpertId], bool] = lambda expert: True,
        threads: int = 4,
    ) -> None:
        """``forget``: a load failed or was given up, with so many bytes to go. ``wanted``: whether
        a speculation is still a guess about the future."""
        self.book, self.source, self.lock = book, source, lock
        self.landed = threading.Condition(lock)
        self._work_came = threading.Condition(lock)
        self._place, self._forget, self._wanted = place, forget, wanted
        self.meter = Meter()
        self.cancelled = 0
        self.stalled = 0.0  # the host waits itself, and the runtime's clock sees it
        self._demand: deque[_Job] = deque()
        self._speculation: deque[_Job] = deque()
        self._guesses: deque[Guess] = deque()
        self._jobs: dict[ExpertId, _Job] = {}
        self._errors: dict[ExpertId, BaseException] = {}
        self._demands_open = 0
        self._speculating = 0  # chunks under way
        self._stop = False
        self._threads = [
            threading.Thread(target=self._work, name=f"understudy-io-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    # ------------------------------------------------------------------------ asked by the runtime

    def demand(self, expert: ExpertId, slot: Slot) -> None:
        """Read ``expert`` into its reserved slot, after the demands already queued."""
        self.demand_all([(expert, slot)])

    def demand_all(
        self, loads: Sequence[tuple[ExpertId, Slot]], *, as_they_lie: bool = False
    ) -> None:
        """The same for several, in this order, or in the order in which they lie on disk."""
        self.require_open()
        jobs = []
        for expert, slot in loads:
            self._errors.pop(expert, None)  # of a forward that was interrupted before it saw it
            jobs.append(self._start(expert, slot, DEMAND_BLOCK, speculative=False))
        if as_they_lie:
            jobs.sort(key=lambda job: (job.chunks[0].file, job.chunks[0].offset))
        self._demand.extend(jobs)
        self._demands_open += len(jobs)
        self._work_came.notify(sum(len(job.chunks) for job in jobs))

    def promote(self, expert: ExpertId) -> None:
        """Somebody needs a speculation that is under way: from now on it is a demand."""
        self._errors.pop(expert, None)  # as in `demand`
        job = self._jobs.get(expert)
        if job is not None and job.speculative:
            job.speculative = False
            self._demands_open += 1
            self._speculation = deque(j for j in self._speculation if j is not job)
            self._demand.appendleft(job)
            self._work_came.notify(len(job.chunks))

    def speculate(self, guesses: Sequence[Guess]) -> None:
        """Replace all queued speculation (not what is under way)."""
        self.cancelled += len(self._guesses)
        self._guesses = deque(guesses)
        if guesses and not self._demands_open:
            self._work_came.notify(SPECULATION_READS)

    def take_error(self, expert: ExpertId) -> BaseException | None:
        """Why the demand for ``expert`` failed, once; ``None`` if it did not."""
        return self._errors.pop(expert, None)

    def tend(self) -> None:
        """The workers note what has landed."""

    def wait(self, timeout: float | None = None) -> bool:
        """Sleep until something landed or failed (spurious wake-ups are possible)."""
        self.require_open()
        return self.landed.wait(timeout)

    def settle(self) -> None:
        """Wait until nothing is under way and nothing is queued."""
        self._guesses.clear()
        while self._jobs:
            self.wait()

    def require_open(self) -> None:
        """Raise if nothing will ever be read again."""
        if self._stop:
            raise UnderstudyError("this model was closed; load it again to use it")

    @property
    def busy(self) -> bool:
        """Whether a demand is queued or under way."""
        return self._demands_open > 0

    @property
    def queued(self) -> int:
        return len(self._demand)

    def close(self) -> None:
        """Stop the workers; reads under way finish first."""
        with self.lock:
            self._stop = True
            self._guesses.clear()
            self._work_came.notify_all()
            self.landed.notify_all()
        for thread in self._threads:
            thread.join()

    # ---------------------------------------------------------------------------------- the workers

    def _start(self, expert: ExpertId, slot: Slot, block: int, *, speculative: bool) -> _Job:
        chunks = deque(self.source.chunks(expert, slot.index, block))
        job = _Job(expert, chunks, speculative, sum(len(c.view) for c in chunks))
        self._jobs[expert] = job
        return job

    def _work(self) -> None:
        with self.lock:
            while not self._stop:
                found = self._next()
                if found is None:
                    self._work_came.wait()
                    continue
                self._carry(*found)

    def _next(self) -> tuple[_Job, Chunk] | None:
        job = self._first(self._demand)
        if job is None and not self._demands_open and self._speculating < SPECULATION_READS:
            job = self._first(self._still_wanted()) or self._issue()
        if job is None:
            return None
        if not job.launched:
            job.launched = True
            self.book.launch(job.expert)
        job.outstanding += 1
        return job, job.chunks.popleft()

    @staticmethod
    def _first(jobs: deque[_Job]) -> _Job | None:
        while jobs and not jobs[0].chunks:
            jobs.popleft()  # its last chunk is under way
        return jobs[0] if jobs else None

    def _still_wanted(self) -> deque[_Job]:
        """Speculation under way, without what the truth has overtaken."""
        for job in [j for j in self._speculation if not self._wanted(j.expert)]:
            if job.outstanding == 0 and job.chunks:
                self._speculation.remove(job)
                del self._jobs[job.expert]
                self._forget(job.expert, job.unread)
                self.landed.notify_all()  # somebody may wait for its slot
        return self._speculation

    def _issue(self) -> _Job | None:
        while self._guesses:
            guess = self._guesses.popleft()
            slot = self._place(guess)
            if slot is not None:
                job = self._start(guess.expert, slot, SPECULATION_BLOCK, speculative=True)
                self._speculation.append(job)
                return job
        return None

    def _carry(self, job: _Job, chunk: Chunk) -> None:
        """Read one chunk without the lock; then, with it, see whether the job is done."""
        error: BaseException | None = None
        speculative = job.speculative  # it may be promoted meanwhile
        self._speculating += speculative
        self.meter.begin()
        self.lock.release()
        try:
            self.source.read(chunk)
        except BaseException as e:
            error = e
        finally:
            self.lock.acquire()
        self.meter.end(len(chunk.view))
        self._speculating -= speculative
        job.outstanding -= 1
        job.unread -= len(chunk.view)
        if error is not None:
            job.error = job.error or error
            job.chunks.clear()
        if not job.chunks and job.outstanding == 0:
            self._verify(job)
            self._finish(job)

    def _verify(self, job: _Job) -> None:
        try:
            if job.error is None:
                self.source.verify(job.expert)
        except Exception as e:
            job.error = e

    def _finish(self, job: _Job) -> None:
        del self._jobs[job.expert]
        if not job.speculative:
            self._demands_open -= 1
        if job.error is None:
            self.book.land(job.expert)
        else:
            self._forget(job.expert, job.unread)
            if not job.speculative:
                self._errors[job.expert] = job.error
        self.landed.notify_all()
        if not self._demands_open and (self._guesses or self._speculation):
            self._work_came.notify(SPECULATION_READS)
