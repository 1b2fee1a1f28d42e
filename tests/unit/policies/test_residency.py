"""The residency book against a slow, obvious model: every step, possible or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from understudy.core import ExpertId
from understudy.policies.residency import BookError, Residency, State

PEOPLE = [ExpertId(layer, expert) for layer in range(2) for expert in range(3)]
someone = st.sampled_from(PEOPLE)

A, B, C = ExpertId(0, 0), ExpertId(0, 1), ExpertId(1, 0)


@dataclass
class Entry:
    state: State
    unused: bool
    pins: int = 0


class Ledger(RuleBasedStateMachine):
    """Writes down on a slip of paper what the book should say, and tries anything at any time."""

    capacity = 3

    def __init__(self) -> None:
        super().__init__()
        self.book = Residency(self.capacity)
        self.slip: dict[ExpertId, Entry] = {}

    def attempt(self, allowed: bool, step: Callable[[], object]) -> bool:
        """Do what is possible; what is not must raise (and `agrees` sees that nothing changed)."""
        if allowed:
            step()
            return True
        with pytest.raises(BookError):
            step()
        return False

    def state(self, expert: ExpertId) -> State:
        return self.slip[expert].state if expert in self.slip else State.FREE

    @rule(expert=someone, unused=st.booleans())
    def reserve(self, expert: ExpertId, unused: bool) -> None:
        possible = expert not in self.slip and len(self.slip) < self.capacity
        if self.attempt(possible, lambda: self.book.reserve(expert, unused=unused)):
            self.slip[expert] = Entry(State.RESERVED, unused)

    @rule(expert=someone)
    def launch(self, expert: ExpertId) -> None:
        possible = self.state(expert) is State.RESERVED
        if self.attempt(possible, lambda: self.book.launch(expert)):
            self.slip[expert].state = State.IN_FLIGHT

    @rule(expert=someone)
    def land(self, expert: ExpertId) -> None:
        possible = self.state(expert) is State.IN_FLIGHT
        if self.attempt(possible, lambda: self.book.land(expert)):
            self.slip[expert].state = State.READY

    @rule(expert=someone)
    def fail(self, expert: ExpertId) -> None:
        possible = self.state(expert) in (State.RESERVED, State.IN_FLIGHT)
        if self.attempt(possible, lambda: self.book.fail(expert)):
            del self.slip[expert]

    @rule(expert=someone)
    def evict(self, expert: ExpertId) -> None:
        possible = self.state(expert) is State.READY and self.slip[expert].pins == 0
        marked = expert in self.slip and self.slip[expert].unused
        left = []
        if self.attempt(possible, lambda: left.append(self.book.evict(expert))):
            assert (left[0].expert, left[0].unused) == (expert, marked)
            del self.slip[expert]

    @rule(expert=someone)
    def pin(self, expert: ExpertId) -> None:
        if self.attempt(expert in self.slip, lambda: self.book.pin(expert)):
            self.slip[expert].pins += 1

    @rule(expert=someone)
    def unpin(self, expert: ExpertId) -> None:
        possible = expert in self.slip and self.slip[expert].pins > 0
        if self.attempt(possible, lambda: self.book.unpin(expert)):
            self.slip[expert].pins -= 1

    @invariant()
    def agrees(self) -> None:
        book = self.book
        book.check_integrity()
        assert set(book) == set(self.slip)
        assert len(book) == len(self.slip)
        assert book.free == self.capacity - len(self.slip)
        places = set()
        for expert in PEOPLE:
            assert (expert in book) == (expert in self.slip)
            assert book.state(expert) is self.state(expert)
            assert book.ready(expert) == (self.state(expert) is State.READY)
            slot = book.slot(expert)
            if slot is None:
                assert expert not in self.slip
                assert not book.evictable(expert)
                continue
            entry = self.slip[expert]
            assert (slot.expert, slot.pins, slot.unused) == (expert, entry.pins, entry.unused)
            assert book.evictable(expert) == (entry.state is State.READY and entry.pins == 0)
            places.add(slot.index)
        assert len(places) == len(self.slip)  # nobody shares a slot

    @precondition(lambda self: any(e.pins for e in self.slip.values()))
    @invariant()
    def a_pin_is_not_idle(self) -> None:
        with pytest.raises(BookError):
            self.book.check_integrity(idle=True)


TestLedger = Ledger.TestCase
TestLedger.settings = settings(
    derandomize=True, max_examples=60, stateful_step_count=40, deadline=None
)


def settled(*experts: ExpertId, slots: int = 3) -> Residency:
    book = Residency(slots)
    for expert in experts:
        book.reserve(expert)
        book.launch(expert)
        book.land(expert)
    return book


def test_the_life_of_a_slot() -> None:
    book = Residency(1)
    slot = book.reserve(A, unused=True)
    assert (slot.state, slot.unused, book.free) == (State.RESERVED, True, 0)
    book.launch(A)
    assert book.state(A) is State.IN_FLIGHT
    book.land(A)
    book.pin(A)
    with pytest.raises(BookError, match="may not leave"):
        book.evict(A)
    book.unpin(A)
    assert book.evict(A).unused
    assert (len(book), book.free) == (0, 1)
    assert book.reserve(B).index == slot.index


def test_a_failed_load_takes_its_pins_with_it() -> None:
    book = Residency(1)
    book.reserve(A)
    book.pin(A)
    book.launch(A)
    book.fail(A)
    book.check_integrity(idle=True)
    with pytest.raises(BookError, match="not pinned"):
        book.unpin(A)


@given(seats=st.integers(1, 6))
@settings(derandomize=True, deadline=None, max_examples=6)
def test_as_many_fit_as_there_are_slots(seats: int) -> None:
    book = Residency(seats)
    given_out = {book.reserve(ExpertId(0, i)).index for i in range(seats)}
    assert given_out == set(range(seats))
    with pytest.raises(BookError, match="no free slot"):
        book.reserve(ExpertId(0, seats))


def lose_a_slot(book: Residency) -> None:
    book._free.pop()


def list_it_twice(book: Residency) -> None:
    book._free.append(book._free[0])


def give_away_an_occupied_one(book: Residency) -> None:
    slot = book.slot(A)
    assert slot is not None
    book._free.append(slot.index)


def forget_where(book: Residency) -> None:
    del book._where[A]


def swap_two(book: Residency) -> None:
    book._where[A], book._where[B] = book._where[B], book._where[A]


def lose_the_name(book: Residency) -> None:
    slot = book.slot(A)
    assert slot is not None
    slot.expert = None
    del book._where[A]


def pin_a_free_one(book: Residency) -> None:
    book.slots[book._free[0]].pins = 1


def owe_a_pin(book: Residency) -> None:
    slot = book.slot(A)
    assert slot is not None
    slot.pins = -1


@pytest.mark.parametrize(
    "damage",
    [
        lose_a_slot,
        list_it_twice,
        give_away_an_occupied_one,
        forget_where,
        swap_two,
        lose_the_name,
        pin_a_free_one,
        owe_a_pin,
    ],
)
def test_the_check_notices(damage: Callable[[Residency], None]) -> None:
    book = settled(A, B)
    book.check_integrity(idle=True)
    damage(book)
    with pytest.raises(BookError):
        book.check_integrity()
