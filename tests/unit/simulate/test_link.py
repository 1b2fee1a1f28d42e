"""The virtual link: arrivals known by hand. One MiB takes one second."""

from __future__ import annotations

from understudy.core import ExpertId, Guess
from understudy.policies.residency import Residency, Slot, State
from understudy.simulate import Link, Machine

MIB = 1 << 20
A, B, C, D = (ExpertId(layer, 0) for layer in range(4))
SIZE = {A: 3 * MIB, B: MIB, C: 5 * MIB, D: 2 * MIB}


class Desk:
    """A link with a book and the simplest minds: every guess is placed while there is room."""

    def __init__(self, slots: int = 4, latency: float = 0.0) -> None:
        self.book = Residency(slots)
        self.given_up: list[tuple[ExpertId, int]] = []
        self.overtaken: set[ExpertId] = set()
        self.link = Link(
            Machine(link=MIB, compute=MIB, latency=latency), self.book, nbytes=SIZE.__getitem__,
            place=self.place, forget=self.forget, wanted=lambda e: e not in self.overtaken,
        )  # fmt: skip

    def place(self, guess: Guess) -> Slot | None:
        if guess.expert in self.book or not self.book.free:
            return None
        return self.book.reserve(guess.expert, unused=True)

    def forget(self, expert: ExpertId, unread: int) -> None:
        self.given_up.append((expert, unread))
        self.book.fail(expert)

    def demand(self, *experts: ExpertId) -> None:
        for expert in experts:
            self.book.reserve(expert)
        self.link.demand_all(experts)

    def speculate(self, *experts: ExpertId) -> None:
        self.link.speculate([Guess(e, 0.9, 1) for e in experts])

    def landings(self) -> list[tuple[float, ExpertId]]:
        """When what is still on its way arrives."""
        found, there = [], {e for e in self.book if self.book.ready(e)}
        while not self.link.idle:
            self.link.wait()
            new = {e for e in self.book if self.book.ready(e)} - there
            found += [(self.link.now, e) for e in sorted(new)]
            there |= new
        return found


def test_demands_arrive_in_order_one_after_the_other() -> None:
    desk = Desk()
    desk.demand(A, B)
    desk.link.advance(2.5)
    assert desk.book.state(A) is State.IN_FLIGHT and desk.book.state(B) is State.RESERVED
    assert desk.landings() == [(3.0, A), (4.0, B)]


def test_every_load_waits_for_its_first_byte() -> None:
    desk = Desk(latency=0.5)
    desk.demand(A, B)
    assert desk.landings() == [(3.5, A), (5.0, B)]


def test_the_clock_runs_on_while_the_link_is_idle() -> None:
    desk = Desk()
    desk.link.advance(10.0)
    desk.demand(B)
    assert desk.landings() == [(11.0, B)]
    assert desk.link.costs.link_idle == 10 / 11
    assert desk.link.costs.link_bandwidth == MIB


def test_a_demand_waits_for_one_piece_of_speculation_and_no_more() -> None:
    desk = Desk()
    desk.speculate(C)  # in pieces of 2 MiB: they end at 2, 4 and 5
    desk.link.advance(0.5)
    desk.demand(B)
    assert desk.landings() == [(3.0, B), (6.0, C)]


def test_speculation_takes_its_slot_when_it_is_issued() -> None:
    desk = Desk()
    desk.demand(A)
    desk.speculate(B, C)
    assert B not in desk.book
    desk.link.advance(3.0)
    assert desk.book.state(B) is State.IN_FLIGHT and C not in desk.book


def test_queued_speculation_is_replaced_and_counted() -> None:
    desk = Desk()
    desk.speculate(A, B, C)  # A is under way at once
    desk.speculate(D)
    assert desk.link.cancelled == 2
    assert [e for _, e in desk.landings()] == [A, D]


def test_a_demand_for_a_speculation_under_way_makes_it_one() -> None:
    desk = Desk()
    desk.speculate(C)
    desk.link.advance(1.0)
    desk.overtaken.add(C)  # would be given up, if nobody needed it
    desk.link.promote(C)
    desk.demand(B)
    assert desk.landings() == [(5.0, C), (6.0, B)]
    assert desk.given_up == []


def test_speculation_that_the_truth_overtook_is_given_up() -> None:
    desk = Desk()
    desk.speculate(C)
    desk.link.advance(1.0)
    desk.overtaken.add(C)
    assert desk.landings() == []
    assert desk.link.now == 2.0  # the piece under way was read to its end
    assert desk.given_up == [(C, 3 * MIB)]
    assert C not in desk.book
