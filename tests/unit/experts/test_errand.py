"""One plan being carried out, where loads must wait for somebody else's slot."""

from __future__ import annotations

import threading
from typing import Any

from tests.unit.experts.test_transfer import Valve
from understudy.core import ExpertId, Guess, LayerEvent, LayerPlan, Load, Phase
from understudy.experts.runtime import _Errand
from understudy.experts.transfer import TransferQueue
from understudy.policies.residency import Residency, Slot

FLYING, NEEDED, GUESSED = ExpertId(1, 0), ExpertId(0, 1), ExpertId(2, 2)


class _Director:
    """One slot; whoever is guessed may replace whoever is there, as the real one allows."""

    def __init__(self) -> None:
        self.book = Residency(1)

    def place(self, guess: Guess) -> Slot | None:
        if guess.expert in self.book:
            return None
        for resident in [e for e in self.book if self.book.evictable(e)]:
            self.book.evict(resident)
        return self.book.reserve(guess.expert, unused=True) if self.book.free else None

    def may_start(self, load: Load) -> bool:
        if load.victim is None or load.victim not in self.book:
            return self.book.free > 0
        return self.book.evictable(load.victim)

    def commit(self, load: Load) -> Slot:
        if load.victim is not None and load.victim in self.book:
            self.book.evict(load.victim)
        return self.book.reserve(load.expert)


def test_a_queued_guess_does_not_take_the_slot_that_a_load_waits_for() -> None:
    lock, director, valve = threading.RLock(), _Director(), Valve()
    queue = TransferQueue(
        director.book, valve, lock=lock, place=director.place,
        forget=lambda expert, unread: director.book.fail(expert), threads=1,
    )  # fmt: skip
    try:
        with lock:
            queue.speculate([Guess(FLYING, 0.9, 1), Guess(GUESSED, 0.9, 2)])
        valve.expect(FLYING)
        event = LayerEvent(step=0, layer=0, phase=Phase.DECODE, ids=[[NEEDED.expert]])
        plan = LayerPlan(event, (), (), (Load(NEEDED, FLYING),), (NEEDED,))
        with lock:
            errand = _Errand(_as_any(director), queue, plan)
            assert errand.waiting  # the flying one has not landed
        valve.open_up()
        with lock:
            for _ in range(100):
                if ready := errand.take_ready(_as_any(_Calm())):
                    break
                queue.wait(0.05)
        assert [expert for expert, _ in ready] == [NEEDED]
    finally:
        valve.open_up()
        queue.close()


class _Calm:
    def check(self) -> None:
        """Nobody presses Ctrl-C."""


def _as_any(thing: object) -> Any:
    return thing
