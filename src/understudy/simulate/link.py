"""The machine as a few numbers, and its link as a virtual queue: the rules of the real one.

Knows: experts, how many bytes each has, virtual seconds. Does not know: events, plans, real time,
disks. The rules are those at the head of `experts.transfer`, on a link that carries one piece at a
time (the real one keeps several reads under way, which together have its bandwidth):

* demands first, in order; speculation starts only when no demand is queued or under way, in pieces
  of at most `SPECULATION_PIECE`, so a demand waits for one piece at most
* a speculation takes its slot when it is issued; queued ones are replaced by the next plan
* a speculation whose layer came and did not need it is given up: the rest is not read
* a demand for a speculation under way makes it a demand; one expert is never read twice at once
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from understudy.core import Costs, ExpertId, Guess
from understudy.policies.residency import Residency, Slot

SPECULATION_PIECE = 2 << 20


@dataclass(frozen=True, slots=True)
class Machine:
    """What a run is priced with. Declared, or measured on a real machine.

    ``link``: bytes/s from the slower tier, all reads together. ``latency``: seconds before the
    first byte of each load. ``compute``: bytes/s at which an expert's weights are worked through
    for one token. ``per_token``: seconds for each further token of the same expert. ``frame``:
    seconds per layer and forward for all that is not experts: attention, norms, the router.
    ``lookahead``: seconds that asking later routers takes, per layer. ``host`` and
    ``host_further``: of a processor that computes misses in host memory beside all that, as in
    `core.Costs`; 0: nobody does.
    """

    link: float
    compute: float
    latency: float = 0.0
    per_token: float = 0.0
    frame: float = 0.0
    lookahead: float = 0.0
    host: float = 0.0
    host_further: float = 0.0

    def __post_init__(self) -> None:
        if self.link <= 0 or self.compute <= 0:
            raise ValueError("a machine's link and compute are bytes per second, more than 0")

    def load_seconds(self, nbytes: int) -> float:
        """One load from its beginning, with the link to itself."""
        return self.latency + nbytes / self.link

    def compute_seconds(self, experts: int, nbytes: int, tokens: int) -> float:
        """``experts`` of ``nbytes`` each, computed together for ``tokens`` (token, rank) pairs."""
        return experts * nbytes / self.compute + (tokens - experts) * self.per_token

    def host_seconds(self, experts: int, nbytes: int, tokens: int) -> float:
        """The same by the processor, where they lie."""
        further = (tokens - experts) / (self.host_further or self.host)
        return nbytes * (experts / self.host + further)


@dataclass(slots=True, eq=False)
class _Job:
    expert: ExpertId
    unread: int
    speculative: bool
    begun: bool = False


class Link:
    """See the head of this file. ``now`` is the virtual clock: nothing happens before somebody
    calls `advance` or `wait`."""

    def __init__(
        self,
        machine: Machine,
        book: Residency,
        *,
        nbytes: Callable[[ExpertId], int],
        place: Callable[[Guess], Slot | None],
        forget: Callable[[ExpertId, int], None],
        wanted: Callable[[ExpertId], bool],
    ) -> None:
        """``place``, ``forget``, ``wanted``: the director's, as the real queue takes them."""
        self.machine, self.book = machine, book
        self.now = 0.0
        self.cancelled = 0
        self.nbytes_carried, self.busy = 0, 0.0
        self._nbytes, self._place, self._forget, self._wanted = nbytes, place, forget, wanted
        self._demand: deque[_Job] = deque()
        self._speculation: deque[_Job] = deque()
        self._guesses: deque[Guess] = deque()
        self._piece: tuple[_Job, int, float] | None = None  # whose, bytes, when it began
        self._end = 0.0  # when the piece under way has arrived
        self._news = False  # something landed or was given up

    # ------------------------------------------------------------------------ asked by the runtime

    def demand_all(self, experts: Sequence[ExpertId]) -> None:
        """Read these, whose slots are reserved, after the demands already queued."""
        self._demand.extend(_Job(e, self._nbytes(e), speculative=False) for e in experts)
        self._begin()

    def promote(self, expert: ExpertId) -> None:
        """Somebody needs a speculation that is under way: from now on it is a demand."""
        job = next((job for job in self._speculation if job.expert == expert), None)
        if job is None:
            return
        job.speculative = False
        self._speculation.remove(job)
        under_way = self._piece is not None and self._piece[0] is job
        if not under_way or (self._piece is not None and job.unread > self._piece[1]):
            self._demand.appendleft(job)
        self._begin()

    def speculate(self, guesses: Sequence[Guess]) -> None:
        """Replace all queued speculation (not what is under way)."""
        self.cancelled += len(self._guesses)
        self._guesses = deque(guesses)
        self._begin()

    def advance(self, until: float) -> None:
        """Let the clock run to ``until``; whatever arrives on the way has landed."""
        while self._piece is not None and self._end <= until:
            self._arrive()
        self.now = until

    def wait(self) -> None:
        """Let the clock run until something lands or is given up."""
        self._news = False
        while not self._news:
            if self._piece is None:
                raise RuntimeError("waiting for a link that carries nothing: a bug, please report")
            self._arrive()

    @property
    def idle(self) -> bool:
        """Nothing is under way and nothing is queued."""
        return self._piece is None and not self._guesses

    @property
    def queued(self) -> int:
        return len(self._demand)

    @property
    def costs(self) -> Costs:
        """What the runtime would have measured by now."""
        bandwidth = self.nbytes_carried / self.busy if self.busy else 0.0
        idle = max(0.0, 1 - self.busy / self.now) if self.now else 0.0
        machine = self.machine
        return Costs(bandwidth, idle, self.queued, machine.host, machine.host_further)

    def carried(self, nbytes: int, seconds: float) -> None:
        """Demands that a caller has accounted for by itself, while the link was idle."""
        self.nbytes_carried += nbytes
        self.busy += seconds

    # ------------------------------------------------------------------------------ what it carries

    def _begin(self) -> None:
        """Start the next piece, if the link is free and there is one."""
        if self._piece is not None:
            return
        if self._demand:
            job = self._demand.popleft()
            size = job.unread  # nothing overtakes a demand: in one piece
        else:
            self._give_up()
            if not self._speculation and not self._issue():
                return
            job = self._speculation[0]
            size = min(job.unread, SPECULATION_PIECE)
        latency = 0.0
        if not job.begun:
            job.begun = True
            latency = self.machine.latency
            self.book.launch(job.expert)
        self._piece = job, size, self.now
        self._end = self.now + (latency + size / self.machine.link)

    def _arrive(self) -> None:
        assert self._piece is not None
        job, size, since = self._piece
        self._piece, self.now = None, self._end
        self.carried(size, self.now - since)
        job.unread -= size
        if not job.unread:
            if job.speculative:
                self._speculation.remove(job)
            self.book.land(job.expert)
            self._news = True
        self._begin()

    def _give_up(self) -> None:
        """Forget the speculation under way that the truth has overtaken."""
        for job in [j for j in self._speculation if not self._wanted(j.expert)]:
            self._speculation.remove(job)
            self._forget(job.expert, job.unread)
            self._news = True

    def _issue(self) -> bool:
        while self._guesses:
            guess = self._guesses.popleft()
            if self._place(guess) is not None:
                size = self._nbytes(guess.expert)
                self._speculation.append(_Job(guess.expert, size, speculative=True))
                return True
        return False
