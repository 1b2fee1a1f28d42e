"""A step that the host only launches: its fences, its bytes, its recordings, and the handover."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

import pytest
import torch
from unit.experts.device.late import Late
from unit.experts.device.slow import Slow

from understudy.core import NOBODY, BudgetTooSmall, Counters, ExpertId
from understudy.experts.device.driven import Driven
from understudy.experts.device.ledger import quotas
from understudy.experts.device.reach import Reach, rates, smallest_of_the_quick

LAYERS, EXPERTS, K, WIDTH = 3, 12, 3, 8
NBYTES, SLOT = WIDTH * 4, WIDTH * 4 + 16
REACH = Reach(programs=3, lines=1, warps=1)


class Scales:
    """Experts that multiply by their bytes; done when the device comes to it."""

    def __init__(self, device: Late, arena: torch.Tensor) -> None:
        self.device, self.arena = device, arena

    def few(self, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(x, torch.nan)
        self.device.later(lambda: out.copy_(self._sum(x, slots, weights)))
        return out

    def _sum(self, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        here = self.arena.view(-1, SLOT)[:, :NBYTES].contiguous().view(torch.float32)
        return mixed(x, here[slots.long()], slots >= 0, weights)


def mixed(
    x: torch.Tensor, scales: torch.Tensor, somebody: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    return ((x[:, None] * scales) * (weights * somebody)[..., None]).sum(1)


class Machine:
    """A device, slabs of random numbers in its host memory, and what drives it."""

    def __init__(
        self,
        seed: int,
        *,
        slots: int = 15,
        tokens: int = 1,
        foresee: Callable[[int], Any] | None = None,
        most: int = 0,
    ) -> None:
        self.device = Late(seed)
        dice = torch.Generator().manual_seed(seed)
        self.slabs = torch.randn(LAYERS, EXPERTS, WIDTH, generator=dice)
        addresses = torch.arange(LAYERS * EXPERTS).view(LAYERS, EXPERTS) * NBYTES
        self.arena = self.device.allocate(slots * SLOT)
        self.driven = Driven(
            self.device,
            [Scales(self.device, self.arena)] * LAYERS,
            self.arena,
            SLOT,
            addresses + self.slabs.data_ptr(),
            NBYTES,
            k=K,
            tokens=tokens,
            foresee=foresee,
            most=most,
            reach=REACH,
        )

    def start(self, *, slots: int = 15) -> Slow:
        """Empty slots, and the rules beside them."""
        self.driven.adopt({}, range(slots))
        self.device.run_all()
        book = self.driven.ledger
        rows = zip(book.pool.tolist(), book.size.tolist(), strict=True)
        return Slow([row[:n] for row, n in rows], NBYTES)

    def expected(
        self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        return mixed(x, self.slabs[layer][ids], ids >= 0, weights)


class Step:
    """The inputs of one forward, at fixed addresses; `roll` fills them for the next."""

    def __init__(self, seed: int, tokens: int = 1) -> None:
        self.dice = random.Random(seed)
        self.ids = [torch.zeros(tokens, K, dtype=torch.int64) for _ in range(LAYERS)]
        # What layer l knows about the next is there once the device has come to layer l.
        self.known = [torch.zeros(tokens, K, dtype=torch.int64) for _ in range(LAYERS)]
        self.foreseen = [torch.zeros(tokens, K, dtype=torch.int64) for _ in range(LAYERS)]
        self.x = [torch.zeros(tokens, WIDTH) for _ in range(LAYERS)]
        self.weights = [torch.zeros(tokens, K) for _ in range(LAYERS)]

    def roll(self) -> None:
        """Half of the experts are wanted often; some pairs want nobody, or the same as another."""
        for layer in range(LAYERS):
            for row in self.ids[layer]:
                often = [NOBODY, *range(EXPERTS // 2), *range(EXPERTS // 2), *range(EXPERTS)]
                row.copy_(torch.tensor(self.dice.choices(often, k=K)))
            self.known[layer].fill_(NOBODY)
            self.foreseen[layer].copy_(self.ids[layer])
            if self.dice.random() < 0.5:
                self.foreseen[layer][0, 0] = self.dice.randrange(EXPERTS)
            generator = torch.Generator().manual_seed(self.dice.randrange(1 << 30))
            self.x[layer].normal_(generator=generator)
            self.weights[layer].uniform_(generator=generator)

    def run(self, driven: Driven) -> list[torch.Tensor]:
        outputs = []
        for layer in range(LAYERS):
            if layer + 1 < LAYERS:
                known, foreseen = self.known[layer + 1], self.foreseen[layer + 1]
                driven.device.later(partial(known.copy_, foreseen))
            outputs.append(driven(layer, self.x[layer], self.ids[layer], self.weights[layer]))
        return outputs

    def run_slowly(self, slow: Slow, most: int) -> None:
        for layer in range(LAYERS):
            if most and layer:
                ids = self.foreseen[layer].tolist()
                slow.commit(layer, slow.guess(layer, ids, most))
            slow.decide(layer, self.ids[layer].tolist())

    def assert_right(self, machine: Machine, outputs: list[torch.Tensor]) -> None:
        for layer, out in enumerate(outputs):
            right = machine.expected(layer, self.x[layer], self.ids[layer], self.weights[layer])
            assert torch.equal(out, right)


def ahead_of(step: Step, device: Callable[[], Late]) -> Callable[[int], Any]:
    """The next layer's router: its ids are there once the device comes to it."""

    def foresee(layer: int) -> torch.Tensor:
        out = torch.full_like(step.known[layer + 1], NOBODY)
        device().later(lambda: out.copy_(step.known[layer + 1]))
        return out

    return foresee


@pytest.mark.parametrize("most", [0, 2])
@pytest.mark.parametrize("seed", range(3))
def test_every_output_is_that_of_resident_experts(
    seed: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams run in any order that the fences allow; counters and books end as the rules say."""
    monkeypatch.setenv("UNDERSTUDY_CHECK", "1")
    step = Step(seed)
    machine = Machine(seed, foresee=ahead_of(step, lambda: machine.device), most=most)
    slow = machine.start()
    for _ in range(6):
        step.roll()
        outputs = step.run(machine.driven)
        step.run_slowly(slow, most)
        counters = machine.driven.counters()
        machine.device.run_all()
        step.assert_right(machine, outputs)
        assert counters == Counters(**slow.counters)
    held = dict(machine.driven.give_back())
    assert held == {ExpertId(*expert): slot for expert, slot in slow.slot_of.items()}
    assert bool(counters.prefetch_used) == bool(counters.prefetch_wasted) == bool(most)


@pytest.mark.parametrize("most", [0, 2])
def test_one_recording_serves_every_token(most: int) -> None:
    step = Step(7)
    machine = Machine(7, foresee=ahead_of(step, lambda: machine.device), most=most)
    slow = machine.start()
    step.roll()
    graph = machine.device.graph()
    graph.begin()
    outputs = step.run(machine.driven)
    graph.end()
    for _ in range(6):
        graph.replay()
        machine.device.run_all()
        step.run_slowly(slow, most)
        step.assert_right(machine, outputs)
        assert machine.driven.counters() == Counters(**slow.counters)
        step.roll()


def test_forwards_of_several_tokens_and_of_one() -> None:
    machine = Machine(1, slots=21, tokens=2)
    slow = machine.start(slots=21)
    for step in (Step(1, 2), Step(2, 1), Step(3, 2), Step(4, 1)):
        step.roll()
        outputs = step.run(machine.driven)
        machine.device.run_all()
        step.run_slowly(slow, 0)
        step.assert_right(machine, outputs)
    assert machine.driven.counters() == Counters(**slow.counters)
    with pytest.raises(ValueError, match="3 tokens at once, planned for 2"):
        Step(5, 3).run(machine.driven)


def test_a_layer_about_which_nothing_is_foreseen_is_no_hole_in_a_recording() -> None:
    step = Step(2)
    step.roll()
    machine = Machine(2, foresee=lambda layer: None, most=2)
    machine.start()
    graph = machine.device.graph()
    graph.begin()
    outputs = step.run(machine.driven)
    graph.end()
    graph.replay()
    machine.device.run_all()
    step.assert_right(machine, outputs)
    assert machine.driven.counters().prefetch_issued == 0


@pytest.mark.parametrize("seed", range(4))
def test_speculation_moves_only_once_demand_has_landed(seed: int) -> None:
    step = Step(seed)
    machine = Machine(seed, foresee=ahead_of(step, lambda: machine.device), most=2)
    machine.start()
    step.roll()
    step.run(machine.driven)
    machine.device.run_all()
    demand, speculation = ["decide", "gather"], ["guess", "gather", "commit"]
    assert machine.device.ran == [*demand, *speculation] * (LAYERS - 1) + demand


def test_nothing_is_launched_for_speculation_that_nobody_asked_for() -> None:
    step = Step(3)
    machine = Machine(3)
    machine.start()
    step.run(machine.driven)
    machine.device.run_all()
    assert machine.device.ran == ["decide", "gather"] * LAYERS


# --------------------------------------------------------------------------------- the handover


def test_a_cache_that_is_handed_over_keeps_its_order() -> None:
    machine = Machine(4)
    residents = {
        ExpertId(0, 5): 3,
        ExpertId(1, 2): 0,
        ExpertId(2, 7): 14,
        ExpertId(0, 1): 8,
        ExpertId(1, 11): 1,
    }
    free = [s for s in range(15) if s not in residents.values()]
    assert machine.driven.adopt(residents, free) == []
    assert machine.driven.give_back() == list(residents.items())
    # and on: whoever is used becomes the most recent
    machine.driven(0, torch.ones(1, WIDTH), torch.tensor([[5, -1, -1]]), torch.ones(1, K))
    order = [expert for expert, _ in machine.driven.give_back()]
    assert order == [*list(residents)[1:], ExpertId(0, 5)]
    assert machine.driven.counters() == Counters(events=1, hits=1)


def test_layers_above_their_quota_give_up_their_least_recent() -> None:
    """15 slots for 3 layers: 5 each. Layer 0 held 9, layer 1 five, layer 2 none."""
    machine = Machine(5)
    residents = {ExpertId(0, e): e for e in range(9)} | {ExpertId(1, e): 9 + e for e in range(5)}
    left = machine.driven.adopt(residents, [14])
    assert left == [ExpertId(0, e) for e in range(4)]
    machine.device.run_all()
    book = machine.driven.ledger
    pools = [sorted(row[:n]) for row, n in zip(book.pool.tolist(), book.size.tolist(), strict=True)]
    assert pools == [[4, 5, 6, 7, 8], [9, 10, 11, 12, 13], [0, 1, 2, 3, 14]]
    assert machine.driven.give_back() == list(residents.items())[4:]


def test_quotas_give_every_slot_to_somebody_who_can_use_it() -> None:
    assert quotas(3, 12, 17) == [6, 6, 5]
    assert quotas(3, 4, 17) == [4, 4, 4]


def test_a_ledger_wants_every_slot_once() -> None:
    machine = Machine(6)
    for residents, free in (({}, range(14)), ({ExpertId(0, 0): 3}, range(15))):
        with pytest.raises(ValueError, match="15 slots once"):
            machine.driven.adopt(residents, free)


def test_a_budget_below_one_events_experts_is_refused_with_what_would_do() -> None:
    """Two tokens of three experts in each of three layers: 18 slots."""
    with pytest.raises(BudgetTooSmall, match=r"needs 18 expert slots .* has 17") as refused:
        Machine(0, slots=17, tokens=2)
    assert refused.value.smallest_bytes == 18 * SLOT
    Machine(0, slots=18, tokens=2)
    Machine(0, slots=LAYERS * EXPERTS, tokens=8)  # nobody needs more than all of them


def test_more_pairs_than_one_kernel_takes_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 64 pairs"):
        Machine(0, slots=LAYERS * EXPERTS, tokens=22)


def test_a_slot_that_holds_another_expert_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERSTUDY_CHECK", "1")
    machine = Machine(8)
    machine.driven.adopt({ExpertId(0, 4): 2}, [s for s in range(15) if s != 2])
    machine.device.run_all()
    machine.driven.ledger.owner[2] = 9
    machine.driven(0, torch.ones(1, WIDTH), torch.tensor([[4, -1, -1]]), torch.ones(1, K))
    with pytest.raises(AssertionError, match="1 times a slot did not hold"):
        machine.driven.counters()


def test_a_forward_that_was_given_up_leaves_nothing_half_done() -> None:
    """Its speculation is under way when the host takes the cache back."""
    step = Step(9)
    machine = Machine(9, foresee=ahead_of(step, lambda: machine.device), most=3)
    slow = machine.start()
    step.roll()
    step.known[1].copy_(step.foreseen[1])
    machine.driven(0, step.x[0], step.ids[0], step.weights[0])
    slow.decide(0, step.ids[0].tolist())
    slow.commit(1, slow.guess(1, step.foreseen[1].tolist(), 3))
    residents = dict(machine.driven.give_back())
    assert residents == {ExpertId(*e): slot for e, slot in slow.slot_of.items()}
    machine.driven.adopt(residents, [s for s in range(15) if s not in residents.values()])
    outputs = step.run(machine.driven)
    machine.device.run_all()
    step.assert_right(machine, outputs)


def test_a_recording_that_failed_is_forgotten() -> None:
    step = Step(11)
    machine = Machine(11, foresee=ahead_of(step, lambda: machine.device), most=2)
    machine.start()
    step.roll()
    for layers in (1, LAYERS):
        machine.driven.adopt({}, range(15))
        graph = machine.device.graph()
        graph.begin()
        if layers == 1:
            machine.driven(0, step.x[0], step.ids[0], step.weights[0])
            with pytest.raises(AssertionError, match="never joined"):
                graph.end()
    outputs = step.run(machine.driven)
    graph.end()
    graph.replay()
    machine.device.run_all()
    step.assert_right(machine, outputs)


# ------------------------------------------------------------------------------------- the reach


def test_the_quickest_reach_is_measured_and_the_smallest_of_the_quick_taken() -> None:
    machine = Machine(10)
    device = machine.device
    small, large = Reach(2, 1, 1), Reach(4, 1, 1)
    launch = device.launch

    def timed(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        launch(kernel, grid, *args, **options)
        device.later(lambda: setattr(device, "clock", device.clock + 1 / grid[0]))

    device.launch = timed  # type: ignore[method-assign]
    slabs = [machine.slabs[0, e].data_ptr() for e in (3, 1)]
    found = rates(device, machine.arena, SLOT, slabs, NBYTES, candidates=(small, large), repeats=2)
    assert found[small] == pytest.approx(2 * 2 * NBYTES)
    assert found[large] == pytest.approx(2 * 4 * NBYTES)
    moved = machine.arena.view(-1, SLOT)[:2, :NBYTES].contiguous().view(torch.float32)
    assert torch.equal(moved, machine.slabs[0, [3, 1]])
    assert smallest_of_the_quick(found) == large
    assert smallest_of_the_quick({small: 99.0, large: 100.0}) == small
