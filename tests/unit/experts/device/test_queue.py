"""The queue between host memory and slots, by hand: who is copied, when it counts as landed."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from pretend import Pretend

from understudy.core import ExpertId, Guess, ReadFailed, UnderstudyError
from understudy.experts.device.queue import DeviceQueue
from understudy.experts.device.slab import Field, Slab
from understudy.experts.device.slots import DeviceSlots
from understudy.policies.residency import Residency, State

NBYTES, EXPERTS = 256, 12
SLAB = Slab({"down_proj": Field("down_proj", torch.uint8, (NBYTES,), 0, 0)}, NBYTES)


class Host:
    """Experts 0.. are here, each full of its own number; others come when the test says so."""

    has_room = True

    def __init__(self, device: Pretend, here: int) -> None:
        self.memory = device.pin(EXPERTS * NBYTES).view(EXPERTS, NBYTES)
        self.memory.copy_(torch.arange(EXPERTS).unsqueeze(1))
        self.here = set(range(here))
        self.asked: list[tuple[ExpertId, Any]] = []

    def __contains__(self, expert: ExpertId) -> bool:
        return expert.expert in self.here

    def take(self, expert: ExpertId) -> torch.Tensor:
        return self.memory[expert.expert]

    def leaving(self, expert: ExpertId, copied: Any) -> None: ...

    def request(self, expert: ExpertId, then: Any) -> None:
        self.asked.append((expert, then))

    def arrived(self, expert: ExpertId, error: BaseException | None) -> None:
        if error is None:
            self.here.add(expert.expert)

    def close(self) -> None: ...


class Desk:
    """A queue with all that it needs. ``slots``: places; the first experts are in host memory."""

    def __init__(
        self, *, here: int = EXPERTS, slots: int = EXPERTS, most: int = 2 * NBYTES
    ) -> None:
        self.device = Pretend()
        self.book = Residency(slots)
        self.slots = DeviceSlots(self.device, [SLAB], slots)
        self.host = Host(self.device, here)
        self.forgotten: list[ExpertId] = []
        self.lock = threading.RLock()
        self.lock.acquire()
        self.queue = DeviceQueue(
            self.book, device=self.device, slots=self.slots, host=self.host,  # type: ignore[arg-type]
            lock=self.lock, place=self.place, forget=self.forget, most=most,
        )  # fmt: skip

    def place(self, guess: Guess) -> Any:
        return self.book.reserve(guess.expert, unused=True) if self.book.free else None

    def forget(self, expert: ExpertId, unread: int) -> None:
        self.book.fail(expert)
        self.forgotten.append(expert)

    def demand(self, *experts: int, prompt: bool = False) -> None:
        loads = [(e, self.book.reserve(e)) for e in map(expert, experts)]
        self.queue.demand_all(loads, as_they_lie=prompt)

    def guess(self, *experts: int) -> None:
        self.queue.speculate([Guess(expert(e), 0.9, 1) for e in experts])

    def states(self, *experts: int) -> list[State]:
        return [self.book.state(expert(e)) for e in experts]

    def bytes_of(self, number: int) -> int:
        """What a launch would read in the slot of an expert: one value, or the test fails."""
        found = expert(number), self.book[expert(number)].index
        with self.slots.reading([found]):
            (value,) = set(self.slots.memory(found[1]).tolist())
        return int(value)


def expert(number: int) -> ExpertId:
    return ExpertId(0, number)


def flying(states: Sequence[State]) -> int:
    return list(states).count(State.IN_FLIGHT)


def test_demands_land_in_the_order_of_the_compute_stream_and_nobody_waits() -> None:
    desk = Desk()
    desk.demand(3, 5)
    assert desk.states(3, 5) == [State.IN_FLIGHT] * 2 and desk.queue.busy
    assert desk.queue.wait()
    assert desk.states(3, 5) == [State.READY] * 2 and not desk.queue.busy
    assert [desk.bytes_of(e) for e in (3, 5)] == [3, 5]
    assert desk.device.waits == 0


def test_speculation_is_capped_and_replaced() -> None:
    desk = Desk()
    desk.guess(1, 2, 3, 4)
    assert flying(desk.states(1, 2, 3, 4)) == 2
    desk.guess(6, 7)
    assert desk.queue.cancelled == 2 and State.FREE in desk.states(6, 7)
    for _ in range(50):  # as copies are seen to land, others are asked for
        desk.queue.tend()
    assert desk.states(1, 2, 6, 7) == [State.READY] * 4
    assert desk.states(3, 4) == [State.FREE] * 2


def test_a_prompt_may_have_all_of_the_next_layer_under_way() -> None:
    desk = Desk()
    desk.demand(0, prompt=True)
    desk.guess(1, 2, 3, 4)
    assert flying(desk.states(1, 2, 3, 4)) == 4
    desk.queue.settle()
    desk.demand(5)
    desk.guess(6, 7, 8)
    assert flying(desk.states(6, 7, 8)) == 2


def test_a_guess_that_is_needed_becomes_a_demand() -> None:
    desk = Desk()
    desk.guess(1, 2)
    desk.queue.promote(expert(2))
    assert desk.queue.queued == 1
    desk.queue.wait()
    assert desk.states(2) == [State.READY] and desk.bytes_of(2) == 2


def test_a_guess_whose_bytes_are_on_disk_is_left_out() -> None:
    desk = Desk(here=2)
    desk.guess(5, 1)
    assert desk.states(5, 1) == [State.FREE, State.IN_FLIGHT] and not desk.host.asked


def test_a_demand_whose_bytes_are_on_disk_is_read_and_those_that_are_here_go_first() -> None:
    desk = Desk(here=2)
    desk.demand(5, 1)
    ((asked, then),) = desk.host.asked
    desk.queue.wait()
    assert desk.states(5, 1) == [State.RESERVED, State.READY]
    then(asked, None)
    desk.queue.wait()
    assert desk.states(5) == [State.READY] and desk.bytes_of(5) == 5


def test_a_failed_read_is_told_once_and_its_slot_is_free() -> None:
    desk = Desk(here=0)
    desk.demand(5)
    ((asked, then),) = desk.host.asked
    then(asked, ReadFailed("gone"))
    desk.queue.wait()
    assert desk.forgotten == [expert(5)] and desk.book.free == EXPERTS
    assert isinstance(desk.queue.take_error(expert(5)), ReadFailed)
    assert desk.queue.take_error(expert(5)) is None
    desk.demand(5)
    desk.host.asked[-1][1](expert(5), None)
    desk.queue.wait()
    assert desk.bytes_of(5) == 5


def test_somebody_who_waits_for_the_slot_of_a_guess_gets_it() -> None:
    desk = Desk(slots=1)
    desk.guess(1)
    assert desk.queue.wait() and desk.states(1) == [State.READY]
    desk.book.evict(expert(1))
    desk.demand(2)  # over the copy of 1, which may not have happened yet
    desk.queue.wait()
    assert desk.bytes_of(2) == 2


@pytest.mark.parametrize("error", [None, ReadFailed("gone")])
def test_an_expert_for_the_processor_comes_to_host_memory_and_no_further(error: Any) -> None:
    """Also when all slabs are being read into at first."""
    desk = Desk(here=0)
    desk.demand(3)
    desk.host.has_room = False

    def answers() -> None:
        with desk.lock:
            desk.host.has_room = True
        desk.host.asked[0][1](expert(3), None)
        while len(desk.host.asked) < 2:
            time.sleep(0.001)
        desk.host.asked[1][1](expert(5), error)

    threading.Thread(target=answers).start()
    if error is None:
        desk.queue.read(expert(5))
    else:
        with pytest.raises(ReadFailed, match="gone"):
            desk.queue.read(expert(5))
    assert desk.states(5) == [State.FREE] and (expert(5) in desk.host) == (error is None)
    desk.queue.wait()
    assert desk.bytes_of(3) == 3


def test_what_a_copy_took_is_metered_by_the_device() -> None:
    desk = Desk()
    desk.demand(1, 2, 3)
    desk.queue.wait()
    desk.queue.settle()
    for _ in range(10):
        desk.queue.tend()
    assert desk.queue.meter.nbytes == 3 * NBYTES and desk.queue.meter.busy > 0


def test_after_the_end_nothing_is_asked_for() -> None:
    desk = Desk()
    desk.demand(1)
    desk.lock.release()
    desk.queue.close()
    with desk.lock, pytest.raises(UnderstudyError, match="was closed"):
        desk.demand(2)
