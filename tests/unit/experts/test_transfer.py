"""The queue between disk and slots, with a source whose reads end when the test says so."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from understudy.core import ExpertId, Guess, ReadFailed, UnderstudyError
from understudy.experts.store import Chunk
from understudy.experts.transfer import SPECULATION_BLOCK, TransferQueue
from understudy.policies.residency import Residency, Slot, State

MIB = 1 << 20
PIECE = SPECULATION_BLOCK
PATIENCE = 10.0  # seconds until a test that would hang fails instead

A, B, C, D = (ExpertId(0, i) for i in range(4))


@dataclass(eq=False)
class Read:
    """One read that a worker is inside of."""

    expert: ExpertId
    offset: int
    nbytes: int
    done: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None


class Valve:
    """A source of experts of ``size`` bytes. A read stands still until the test lets it through."""

    def __init__(self, size: int = 64, *, open_valve: bool = False) -> None:
        self.size, self.open = size, open_valve
        self.begun: list[Read] = []
        self.running: list[Read] = []
        self.unverifiable: set[ExpertId] = set()
        self.broken: set[ExpertId] = set()
        self._change = threading.Condition()

    # What the queue calls.

    def chunks(self, expert: ExpertId, slot: int, block: int) -> list[Chunk]:
        view = memoryview(bytearray(self.size))
        return [
            Chunk(expert.layer * 100 + expert.expert, at, view[at : at + block], 0)
            for at in range(0, self.size, block)
        ]

    def read(self, chunk: Chunk) -> None:
        read = Read(ExpertId(*divmod(chunk.file, 100)), chunk.offset, len(chunk.view))
        with self._change:
            self.begun.append(read)
            self.running.append(read)
            self._change.notify_all()
        if not self.open:
            assert read.done.wait(PATIENCE), f"nobody let {read} through"
        with self._change:
            self.running.remove(read)
            self._change.notify_all()
        if read.error is not None or read.expert in self.broken:
            raise read.error or ReadFailed(f"{read.expert} is broken")

    def verify(self, expert: ExpertId) -> None:
        if expert in self.unverifiable:
            raise ReadFailed(f"{expert} was changed")

    # What tests call.

    def expect(self, *experts: ExpertId) -> list[Read]:
        """Wait until exactly reads of these experts are under way; in the order they began."""
        with self._change:
            reached = self._change.wait_for(
                lambda: sorted(r.expert for r in self.running) == sorted(experts), PATIENCE
            )
            assert reached, f"expected {experts}, running {self.running}"
            return list(self.running)

    def let(self, read: Read, error: Exception | None = None) -> None:
        read.error = error
        read.done.set()
        with self._change:
            assert self._change.wait_for(lambda: read not in self.running, PATIENCE)

    def open_up(self) -> None:
        self.open = True
        with self._change:
            for read in self.running:
                read.done.set()

    def order(self) -> list[ExpertId]:
        """Experts in the order in which their first reads began."""
        return list(dict.fromkeys(r.expert for r in self.begun))


class Desk:
    """A queue with a book and the simplest possible minds."""

    def __init__(self, source: Valve, *, slots: int = 4, threads: int = 1) -> None:
        self.source, self.book = source, Residency(slots)
        self.placed: list[ExpertId] = []
        self.overtaken: set[ExpertId] = set()
        self.given_up: list[tuple[ExpertId, int]] = []
        self.queue = TransferQueue(
            self.book,
            source,
            lock=threading.RLock(),
            place=self.place,
            forget=self.forget,
            wanted=lambda expert: expert not in self.overtaken,
            threads=threads,
        )
        self.lock = self.queue.landed

    def place(self, guess: Guess) -> Slot | None:
        if guess.expert in self.book or not self.book.free:
            return None
        self.placed.append(guess.expert)
        return self.book.reserve(guess.expert, unused=True)

    def forget(self, expert: ExpertId, unread: int) -> None:
        self.given_up.append((expert, unread))
        self.book.fail(expert)

    def demand(self, *experts: ExpertId) -> None:
        with self.lock:
            for expert in experts:
                self.queue.demand(expert, self.book.reserve(expert))

    def speculate(self, *experts: ExpertId) -> None:
        with self.lock:
            self.queue.speculate([Guess(e, 0.5, 1) for e in experts])

    def promote(self, expert: ExpertId) -> None:
        with self.lock:
            self.queue.promote(expert)

    def until(self, condition: Callable[[], bool]) -> None:
        with self.lock:
            assert self.lock.wait_for(condition, PATIENCE)
            self.book.check_integrity()

    def until_ready(self, *experts: ExpertId) -> None:
        self.until(lambda: all(self.book.ready(e) for e in experts))

    def states(self, *experts: ExpertId) -> list[State]:
        with self.lock:
            return [self.book.state(e) for e in experts]

    def error(self, expert: ExpertId) -> BaseException | None:
        with self.lock:
            return self.queue.take_error(expert)


@contextmanager
def desk(source: Valve, *, slots: int = 4, threads: int = 1) -> Iterator[Desk]:
    opened = Desk(source, slots=slots, threads=threads)
    try:
        yield opened
    finally:
        source.open_up()
        opened.queue.close()


# ---------------------------------------------------------------------------------------- demand


def test_demands_are_read_in_the_order_of_need() -> None:
    source = Valve()
    with desk(source) as d:
        d.demand(A, B, C)
        for expert in (A, B, C):
            (read,) = source.expect(expert)
            source.let(read)
        d.until_ready(A, B, C)
    assert source.order() == [A, B, C]


def test_a_sweep_is_read_in_the_order_in_which_it_lies_on_disk() -> None:
    source = Valve()
    with desk(source) as d:
        with d.lock:
            loads = [(expert, d.book.reserve(expert)) for expert in (C, A, B)]
            d.queue.demand_all(loads, as_they_lie=True)
        for expert in (A, B, C):
            (read,) = source.expect(expert)
            source.let(read)
        d.until_ready(A, B, C)
    assert source.order() == [A, B, C]


def test_several_threads_read_several_experts_at_once() -> None:
    source = Valve()
    with desk(source, threads=3) as d:
        d.demand(A, B, C)
        reads = {r.expert: r for r in source.expect(A, B, C)}
        source.let(reads[C])
        d.until_ready(C)  # whoever arrives first is there first
        assert d.states(A, B) == [State.IN_FLIGHT] * 2


def test_one_expert_is_read_by_several_threads_and_ready_after_its_last_byte() -> None:
    source = Valve(5 * MIB)
    with desk(source, threads=4) as d:
        d.demand(A)
        first, second, third = sorted(source.expect(A, A, A), key=lambda r: r.offset)
        assert [first.nbytes, second.nbytes, third.nbytes] == [2 * MIB, 2 * MIB, MIB]
        source.let(third)
        source.let(first)
        source.expect(A)
        assert d.states(A) == [State.IN_FLIGHT]
        source.let(second)
        d.until_ready(A)


# ----------------------------------------------------------------------------------- speculation


def test_speculation_is_read_in_pieces_and_in_order() -> None:
    source = Valve(5 * PIECE // 2, open_valve=True)
    with desk(source) as d:
        d.speculate(B, A)
        d.until_ready(A, B)
    assert [(r.expert, r.nbytes) for r in source.begun] == [
        (e, n) for e in (B, A) for n in (PIECE, PIECE, PIECE // 2)
    ]


def test_demand_overtakes_speculation_between_two_pieces() -> None:
    source = Valve(2 * PIECE)
    with desk(source) as d:
        d.speculate(A, B)
        (piece,) = source.expect(A)
        d.demand(C, D)
        source.let(piece)
        for expert in (C, C, D, D, A, B, B):  # the rest of A only when nobody needs anything
            (read,) = source.expect(expert)
            source.let(read)
        d.until_ready(A, B, C, D)
    assert [r.expert for r in source.begun] == [A, C, C, D, D, A, B, B]


def test_idle_threads_do_not_speculate_beside_a_demand() -> None:
    source = Valve()
    with desk(source, threads=4) as d:
        d.demand(A)
        (read,) = source.expect(A)
        d.speculate(B, C)
        time.sleep(0.02)
        assert d.states(B, C) == [State.FREE] * 2
        source.let(read)
        source.expect(B, C)


def test_a_speculation_takes_its_slot_when_it_is_issued() -> None:
    source = Valve()
    with desk(source) as d:
        d.speculate(A, B)
        source.expect(A)
        assert d.placed == [A]
        assert d.states(A, B) == [State.IN_FLIGHT, State.FREE]


def test_queued_speculation_is_replaced_but_not_what_is_under_way() -> None:
    source = Valve()
    with desk(source) as d:
        d.speculate(A, B, C)
        (read,) = source.expect(A)
        d.speculate(D)
        source.let(read)
        source.expect(D)
        assert d.states(A, B, C) == [State.READY, State.FREE, State.FREE]
        assert d.queue.cancelled == 2


def test_an_empty_answer_cancels() -> None:
    source = Valve(open_valve=True)
    with desk(source) as d:
        d.demand(A)  # keeps speculation waiting only while it is under way, so queue under the lock
        with d.lock:
            d.queue.speculate([Guess(B, 0.5, 1)])
            d.queue.speculate([])
            assert d.queue.cancelled == 1
        d.until_ready(A)
        with d.lock:
            d.queue.settle()
    assert source.order() == [A]


def test_who_gets_no_slot_is_passed_over() -> None:
    source = Valve(open_valve=True)
    with desk(source, slots=2) as d:
        d.demand(A)
        d.until_ready(A)
        d.speculate(A, B, C)  # A is there, B takes the last slot, C finds none
        d.until_ready(B)
        with d.lock:
            d.queue.settle()
        assert d.states(C) == [State.FREE]
    assert source.order() == [A, B]


def test_a_late_hit_waits_for_the_speculation_and_nothing_is_read_twice() -> None:
    source = Valve(3 * PIECE)
    with desk(source) as d:
        d.speculate(A, B)
        source.expect(A)
        d.promote(A)
        d.demand(C)
        source.open_up()
        d.until_ready(A, B, C)
    assert source.order() == [A, C, B]  # A before the later demand, B after all demands
    a = [(r.offset, r.nbytes) for r in source.begun if r.expert == A]
    assert a == [(i * PIECE, PIECE) for i in range(3)]


def test_promoting_twice_or_somebody_else_changes_nothing() -> None:
    source = Valve()
    with desk(source) as d:
        d.speculate(A)
        source.expect(A)
        d.promote(A)
        d.promote(A)
        d.promote(B)
        source.open_up()
        d.until_ready(A)
        d.speculate(B)  # would wait for ever behind a demand that was counted twice
        d.until_ready(B)


# -------------------------------------------------------------------------------------- failures


def test_a_failed_speculation_is_forgotten() -> None:
    source = Valve()
    with desk(source) as d:
        d.speculate(A)
        (read,) = source.expect(A)
        source.let(read, ReadFailed("scratched"))
        d.until(lambda: A not in d.book)
        assert d.error(A) is None
        source.open_up()
        d.demand(A)
        d.until_ready(A)


def test_a_failed_demand_says_why_once_and_can_be_tried_again() -> None:
    source = Valve()
    with desk(source) as d:
        d.demand(A)
        (read,) = source.expect(A)
        reason = ReadFailed("scratched")
        source.let(read, reason)
        d.until(lambda: A not in d.book)
        assert d.error(A) is reason
        assert d.error(A) is None
        source.open_up()
        d.demand(A)
        d.until_ready(A)


def test_a_promoted_speculation_fails_like_a_demand() -> None:
    source = Valve()
    with desk(source) as d:
        d.speculate(A)
        (read,) = source.expect(A)
        d.promote(A)
        source.let(read, ReadFailed("scratched"))
        d.until(lambda: A not in d.book)
        assert isinstance(d.error(A), ReadFailed)


def test_the_rest_of_a_failed_expert_is_not_read() -> None:
    source = Valve(20 * MIB)
    with desk(source) as d:
        d.demand(A)
        (read,) = source.expect(A)
        source.let(read, ReadFailed("scratched"))
        d.until(lambda: A not in d.book)
        d.demand(B)
        source.expect(B)
    assert [r.expert for r in source.begun].count(A) == 1


def test_a_slot_is_not_given_back_while_another_thread_still_writes_into_it() -> None:
    source = Valve(4 * MIB)
    with desk(source, threads=2) as d:
        d.demand(A)
        first, second = source.expect(A, A)
        source.let(first, ReadFailed("scratched"))
        source.expect(A)
        time.sleep(0.02)
        assert d.states(A) == [State.IN_FLIGHT]
        source.let(second)
        d.until(lambda: A not in d.book)


def test_an_expert_whose_file_changed_does_not_count_as_read() -> None:
    source = Valve(open_valve=True)
    source.unverifiable = {A}
    with desk(source) as d:
        d.demand(A)
        d.until(lambda: A not in d.book)
        assert isinstance(d.error(A), ReadFailed)


def test_an_old_failure_is_not_told_to_a_later_demand() -> None:
    source = Valve(open_valve=True)
    source.broken = {A}
    with desk(source) as d:
        d.demand(A)  # the forward that wanted it was interrupted and never asked
        d.until(lambda: A not in d.book)
        source.broken = set()
        d.demand(A)
        assert d.error(A) is None
        d.until_ready(A)


def test_an_old_failure_is_not_told_to_a_late_hit() -> None:
    source = Valve(open_valve=True)
    source.broken = {A}
    with desk(source) as d:
        d.demand(A)  # interrupted, as above
        d.until(lambda: A not in d.book)
        source.broken, source.open = set(), False
        d.speculate(A)
        source.expect(A)
        d.promote(A)
        assert d.error(A) is None
        source.open_up()
        d.until_ready(A)


# ----------------------------------------------------------------------------------------- the end


def test_close_ends_every_thread_and_may_be_repeated() -> None:
    source = Valve(open_valve=True)
    before = set(threading.enumerate())
    d = Desk(source, threads=3)
    assert len(set(threading.enumerate()) - before) == 3
    d.speculate(A, B)
    d.queue.close()
    d.queue.close()
    assert set(threading.enumerate()) <= before


def test_close_lets_reads_under_way_finish_and_starts_no_more() -> None:
    source = Valve(3 * MIB)
    with desk(source) as d:
        d.speculate(A, B)
        source.expect(A)
        closing = threading.Thread(target=d.queue.close)
        closing.start()
        time.sleep(0.01)
        assert closing.is_alive()
        source.open_up()
        closing.join(PATIENCE)
        assert not closing.is_alive()
    assert len(source.begun) == 1


def test_whoever_waits_when_it_is_closed_is_told() -> None:
    source = Valve()
    told: list[BaseException] = []
    with desk(source) as d:

        def wait() -> None:
            with d.lock:
                try:
                    while not d.book.ready(A):
                        d.queue.wait(PATIENCE)
                except UnderstudyError as e:
                    told.append(e)

        d.demand(A, B)
        source.expect(A)
        waiter = threading.Thread(target=wait)
        waiter.start()
        closing = threading.Thread(target=d.queue.close)
        closing.start()
        waiter.join(PATIENCE)
        assert not waiter.is_alive()
    assert len(told) == 1
    assert "closed" in str(told[0])


def test_nothing_can_be_demanded_after_the_end() -> None:
    d = Desk(Valve(open_valve=True))
    d.queue.close()
    with pytest.raises(UnderstudyError, match="closed"):
        d.demand(A)
    assert d.states(A) == [State.RESERVED]  # whose it was gives it back


# ------------------------------------------------------------------------------------- the meter


def test_the_meter_counts_every_byte_and_only_busy_time() -> None:
    source = Valve(3 * MIB, open_valve=True)
    with desk(source) as d:
        time.sleep(0.05)
        d.demand(A, B)
        d.until_ready(A, B)
        meter = d.queue.meter
        assert meter.nbytes == 6 * MIB
        assert 0 < meter.busy < 0.05
        assert meter.bandwidth == meter.nbytes / meter.busy
        assert 0 < meter.idle < 1


# --------------------------------------------------------------------------------------- stress


class Shaky(Valve):
    """Reads that take no or little time, and sometimes fail."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__(3 * MIB)
        self.dice, self.turn = dice, threading.Lock()
        self.reading: dict[tuple[ExpertId, int], int] = {}
        self.collisions = 0

    def read(self, chunk: Chunk) -> None:
        key = (ExpertId(*divmod(chunk.file, 100)), chunk.offset)
        with self.turn:
            self.collisions += key in self.reading
            self.reading[key] = 1
            pause, fails = self.dice.random(), self.dice.random() < 0.05
        if pause < 0.3:
            time.sleep(pause / 1000)
        with self.turn:
            del self.reading[key]
        if fails:
            raise ReadFailed(f"{key[0]} slipped")


def crowd(dice: random.Random) -> Sequence[ExpertId]:
    return [ExpertId(dice.randrange(2), e) for e in dice.sample(range(8), dice.choice([1, 2, 3]))]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threads", [1, 4])
def test_stress(seed: int, threads: int) -> None:
    """Events with demands, late hits, failures, evictions and speculation: every expert of an event
    either comes or says why, the book never contradicts itself, nothing is read twice at once."""
    dice = random.Random(seed)
    source = Shaky(random.Random(seed + 100))
    d = Desk(source, slots=5, threads=threads)
    served = failed = 0

    def make_room(keep: Sequence[ExpertId]) -> None:
        while not d.book.free:
            out = [e for e in d.book if d.book.evictable(e) and e not in keep]
            if out:
                d.book.evict(dice.choice(out))
            else:
                assert d.queue.wait(PATIENCE)

    for _ in range(60):
        needed = crowd(dice)
        with d.lock:
            d.queue.speculate(())
            for expert in needed:
                d.queue.take_error(expert)
            for expert in needed:
                if expert not in d.book:
                    make_room(needed)
                if expert in d.book:
                    d.queue.promote(expert)
                else:
                    d.queue.demand(expert, d.book.reserve(expert))
            d.queue.speculate([Guess(e, 0.5, 1) for e in crowd(dice)])
            for expert in needed:
                while not d.book.ready(expert):
                    error = d.queue.take_error(expert)
                    if error is not None:
                        assert isinstance(error, ReadFailed)
                        failed += 1
                        break
                    assert d.queue.wait(PATIENCE), f"{expert} neither came nor failed"
                else:
                    served += 1
            d.book.check_integrity(idle=True)
    with d.lock:
        d.queue.settle()
        assert all(d.book.ready(e) for e in d.book)
        d.book.check_integrity(idle=True)
    d.queue.close()
    assert source.collisions == 0
    assert served > 60
    assert failed > 0


# ------------------------------------------------------------------ what the truth has overtaken


def test_a_speculation_that_the_truth_overtook_is_given_up() -> None:
    source = Valve(4 * PIECE)
    with desk(source) as d:
        d.speculate(A)
        (first,) = source.expect(A)
        d.overtaken.add(A)
        source.let(first)
        d.until(lambda: A not in d.book)
        assert d.given_up == [(A, 3 * PIECE)]
        assert len(source.begun) == 1


def test_speculation_leaves_room_for_a_demand() -> None:
    source = Valve(8 * PIECE)
    with desk(source, threads=4) as d:
        d.speculate(A)
        source.expect(A, A)  # two pieces, however many workers there are
        d.demand(B)
        source.expect(A, A, B, B)
        source.open_up()
        d.until(lambda: d.book.ready(B))
