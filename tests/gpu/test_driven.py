"""A step that the device drives itself, on a real one: the bytes, the books, the recording.

Run these by themselves: where Triton's interpreter was switched on for other tests, kernels cannot
be compiled.
"""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
import torch
from unit.experts.device.slow import Slow

from understudy.core import NOBODY, Counters, ExpertId

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="Triton's interpreter is on here"
    ),
]

LAYERS, EXPERTS, K, WIDTH = 4, 32, 4, 1060
NBYTES, SLOT = WIDTH * 4, WIDTH * 4 + 48
SLOTS = 50


class Scales:
    """Experts that multiply by their bytes."""

    def __init__(self, arena: torch.Tensor) -> None:
        self.here = arena.view(torch.float32).view(-1, SLOT // 4)[:, :WIDTH]

    def few(self, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return mixed(x, self.here[slots.clamp(min=0).long()], slots >= 0, weights)


def mixed(
    x: torch.Tensor, scales: torch.Tensor, somebody: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    return ((x[:, None] * scales) * (weights * somebody)[..., None]).sum(1)


class Machine:
    def __init__(self, tokens: int, most: int) -> None:
        from understudy.experts.device.cuda import open_cuda
        from understudy.experts.device.driven import Driven

        self.device = open_cuda("cuda")
        at = self.device.torch_device
        dice = torch.Generator().manual_seed(1)
        pinned = self.device.pin(LAYERS * EXPERTS * NBYTES)
        self.slabs = pinned.view(torch.float32).view(LAYERS, EXPERTS, WIDTH)
        self.slabs.normal_(generator=dice)
        self.resident = self.slabs.to(at)
        self.ids = torch.zeros(LAYERS, tokens, K, dtype=torch.int64, device=at)
        self.foreseen = torch.zeros_like(self.ids)
        self.x = torch.zeros(LAYERS, tokens, WIDTH, device=at)
        self.weights = torch.zeros(LAYERS, tokens, K, device=at)
        addresses = torch.arange(LAYERS * EXPERTS).view(LAYERS, EXPERTS) * NBYTES
        arena = self.device.allocate(SLOTS * SLOT)
        self.driven = Driven(
            self.device,
            [Scales(arena)] * LAYERS,
            arena,
            SLOT,
            addresses + pinned.data_ptr(),
            NBYTES,
            k=K,
            tokens=tokens,
            foresee=lambda layer: self.foreseen[layer + 1].clone(),
            most=most,
        )

    def start(self) -> Slow:
        self.driven.adopt({}, range(SLOTS))
        pools, sizes = self.device.fetch(self.driven.ledger.pool, self.driven.ledger.size)
        return Slow([row[:n] for row, n in zip(pools, sizes, strict=True)], NBYTES)

    def roll(self, dice: random.Random) -> None:
        """New inputs at the old addresses."""
        often = [NOBODY, *range(EXPERTS // 2), *range(EXPERTS // 2), *range(EXPERTS)]
        rows = [dice.choices(often, k=self.ids[0].numel()) for _ in range(LAYERS)]
        self.ids.copy_(torch.tensor(rows).view(self.ids.shape))
        self.foreseen.copy_(self.ids)
        self.foreseen[:, 0, 0] = dice.randrange(EXPERTS)
        self.x.normal_()
        self.weights.uniform_()

    def run(self) -> list[torch.Tensor]:
        return [
            self.driven(layer, self.x[layer], self.ids[layer], self.weights[layer])
            for layer in range(LAYERS)
        ]

    def assert_right(self, outputs: list[torch.Tensor], slow: Slow, most: int) -> None:
        for layer, out in enumerate(outputs):
            ids = self.ids[layer]
            scales = self.resident[layer][ids.clamp(min=0)]
            assert torch.equal(out, mixed(self.x[layer], scales, ids >= 0, self.weights[layer]))
            if most and layer:
                foreseen = self.foreseen[layer].tolist()
                slow.commit(layer, slow.guess(layer, foreseen, most))
            slow.decide(layer, ids.tolist())
        assert self.driven.counters() == Counters(**slow.counters)
        held = {ExpertId(*expert): slot for expert, slot in slow.slot_of.items()}
        assert dict(self.driven.give_back()) == held


@pytest.mark.parametrize("most", [0, 2])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("recorded", [False, True])
def test_every_token_is_that_of_resident_experts(
    tokens: int, most: int, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNDERSTUDY_CHECK", "1")
    machine, dice = Machine(tokens, most), random.Random(tokens)
    graph: Any = None
    if recorded:
        machine.start()
        machine.run()  # compiles
        graph = machine.device.graph()
    slow = machine.start()
    if recorded:
        before = machine.driven.counters()
        graph.begin()
        outputs = machine.run()
        graph.end()
        slow.counters.update(before.as_dict())
    for _ in range(40):
        machine.roll(dice)
        if recorded:
            graph.replay()
        else:
            outputs = machine.run()
        machine.assert_right(outputs, slow, most)
    counters = machine.driven.counters()
    assert counters.hits and counters.misses
    assert bool(counters.prefetch_used) == bool(most)


def test_gather_fills_slots_whatever_its_reach() -> None:
    from understudy.experts.device.cuda import open_cuda
    from understudy.experts.device.reach import CANDIDATES, rates

    device = open_cuda("cuda")
    nbytes, slot = (3 << 20) + 16, (3 << 20) + 256
    pinned = device.pin(2 * nbytes)
    pinned.view(torch.int32).random_()
    where = [pinned.data_ptr() + nbytes, pinned.data_ptr()]
    right = pinned.to(device.torch_device).view(2, nbytes).flip(0)
    for reach in CANDIDATES:
        arena = device.allocate(2 * slot).zero_()
        found = rates(device, arena, slot, where, nbytes, candidates=[reach], repeats=1)
        assert found[reach] > 0
        assert torch.equal(arena.view(2, slot)[:, :nbytes], right)
        assert not arena.view(2, slot)[:, nbytes:].any()
