"""The kernels against their rules in lists and dicts, event by event, on Triton's interpreter."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported

import pytest
import torch
from unit.experts.device.late import Late
from unit.experts.device.slow import Slow

from understudy.core import NOBODY, Counters
from understudy.experts.device import decide as kernels
from understudy.experts.device.ledger import CopyList, Ledger, power_of_two

NBYTES = 144  # nine lines: not a whole number of anything else


class Bench:
    """A ledger over slabs full of random bytes, and the kernels, launched one by one."""

    def __init__(self, layers: int, experts: int, slots: int, seed: int) -> None:
        self.device = Late(seed)
        dice = torch.Generator().manual_seed(seed)
        self.slabs = torch.randint(
            0, 256, (layers, experts, NBYTES), dtype=torch.uint8, generator=dice
        )
        start = self.slabs.data_ptr()
        addresses = torch.arange(layers * experts).view(layers, experts) * NBYTES + start
        self.ledger = Ledger(self.device, addresses, slots)
        self.ledger.adopt({}, range(slots))
        self.device.run_all()
        self.arena = torch.zeros(slots * NBYTES, dtype=torch.uint8)

    def launch(self, kernel: str, programs: int, *args: object, **constants: int) -> None:
        self.device.launch(getattr(kernels, kernel), (programs,), *args, **constants)
        self.device.run_all()

    def decide(self, layer: int, ids: torch.Tensor) -> list[list[int]]:
        book, to = self.ledger, self.ledger.demand
        slots = torch.full(ids.shape, 77, dtype=torch.int32)
        self.launch(
            "decide",
            1,
            *(ids, slots, layer, ids.numel()),
            *(book.table, book.owner, book.stamp, book.fresh, book.pool, book.size, book.clock),
            *(book.addresses, to.sources, to.targets, to.length, book.counters, NBYTES),
            EXPERTS=book.experts,
            POOL=book.capacity,
            PAIRS=power_of_two(ids.numel()),
        )
        return slots.tolist()

    def guess(self, layer: int, ids: torch.Tensor, most: int) -> None:
        book, to = self.ledger, self.ledger.guessed
        self.launch(
            "guess",
            1,
            *(ids, layer, *ids.shape, most),
            *(book.table, book.owner, book.stamp, book.guard, book.fresh),
            *(book.pool, book.size, book.clock, book.addresses),
            *(to.sources, to.targets, to.names, to.length, book.counters, NBYTES),
            EXPERTS=book.experts,
            POOL=book.capacity,
            PAIRS=power_of_two(ids.numel()),
        )

    def commit(self) -> None:
        book, came = self.ledger, self.ledger.guessed
        self.launch(
            "commit",
            1,
            *(came.targets, came.names, came.length, book.table, book.owner, book.fresh),
            LIST=64,
        )

    def gather(self, moves: CopyList, programs: int, lines: int) -> None:
        arena = self.arena.view(torch.int32)
        self.launch(
            "gather",
            programs,
            *(moves.sources, moves.targets, moves.length, arena, NBYTES // 16, NBYTES // 16),
            LINES=lines,
        )

    def loads(self, layer: int, moves: CopyList) -> list[tuple[int, int]]:
        """What a copy list says, as (expert, slot)."""
        n = int(moves.length)
        rows = self.ledger.addresses[layer].tolist()
        return [
            (rows.index(source), slot)
            for source, slot in zip(
                moves.sources[:n].tolist(), moves.targets[:n].tolist(), strict=True
            )
        ]

    def assert_equals(self, slow: Slow) -> None:
        book = self.ledger
        held = {
            (layer, expert): slot
            for layer, row in enumerate(book.table.tolist())
            for expert, slot in enumerate(row)
            if slot >= 0
        }
        owned = {
            slot: divmod(name, book.experts)
            for slot, name in enumerate(book.owner.tolist())
            if name >= 0
        }
        assert held == slow.slot_of
        assert owned == slow.owner_of
        stamps = book.stamp.tolist()
        assert {slot: stamps[slot] for slot in slow.last_use} == slow.last_use
        assert {s for s, f in enumerate(book.fresh.tolist()) if f} == slow.unused
        assert book.count() == (Counters(**slow.counters), 0)

    def assert_contents(self) -> None:
        arena = self.arena.view(-1, NBYTES)
        for slot, name in enumerate(self.ledger.owner.tolist()):
            if name >= 0:
                layer, expert = divmod(name, self.ledger.experts)
                assert torch.equal(arena[slot], self.slabs[layer, expert])


def slow_beside(bench: Bench) -> Slow:
    sizes = bench.ledger.size.tolist()
    pools = [row[:n] for row, n in zip(bench.ledger.pool.tolist(), sizes, strict=True)]
    return Slow(pools, NBYTES)


def routed(dice: random.Random, experts: int, tokens: int, k: int) -> torch.Tensor:
    """Skewed ids, tokens that agree in part, now and then nobody."""
    rows = []
    for _ in range(tokens):
        row: list[int] = []
        while len(row) < k:
            expert = min(int(dice.expovariate(4 / experts)), experts - 1)
            if dice.random() < 0.1:
                row.append(NOBODY)
            elif expert not in row:
                row.append(expert)
        rows.append(row)
    return torch.tensor(rows, dtype=dice.choice([torch.int64, torch.int32]))


# layers, experts, slots, k, most tokens, most guesses
SHAPES = {
    "usual": (3, 16, 22, 2, 2, 2),
    "a pool of exactly k": (2, 12, 8, 4, 1, 4),
    "a pool of exactly one event's experts": (2, 24, 32, 2, 8, 3),
    "everybody fits": (2, 6, 12, 3, 4, 2),
    "more slots than experts": (2, 5, 13, 2, 3, 9),
    "64 pairs": (1, 70, 66, 8, 8, 20),
    "one slot": (2, 4, 2, 1, 1, 1),
    "no speculation": (2, 16, 14, 3, 2, 0),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_event_ends_as_the_rules_say(shape: str) -> None:
    layers, experts, slots, k, most_tokens, most = SHAPES[shape]
    dice = random.Random(shape)
    bench = Bench(layers, experts, slots, seed=len(shape))
    slow = slow_beside(bench)
    for step in range(30):
        layer = step % layers
        ids = routed(dice, experts, dice.randint(1, most_tokens), k)
        if most and layer:
            right = dice.random() < 0.5
            foreseen = ids if right else routed(dice, experts, len(ids), k)
            bench.guess(layer, foreseen, most)
            loads = slow.guess(layer, foreseen.tolist(), most)
            assert bench.loads(layer, bench.ledger.guessed) == loads
            bench.assert_equals(slow)
            bench.gather(bench.ledger.guessed, 3, 4)
            bench.commit()
            slow.commit(layer, loads)
        found = bench.decide(layer, ids)
        expected, loads = slow.decide(layer, ids.tolist())
        assert found == expected
        assert bench.loads(layer, bench.ledger.demand) == loads
        bench.assert_equals(slow)
        bench.gather(bench.ledger.demand, 3, 4)
    bench.assert_contents()
    assert slow.counters["hits"] and slow.counters["misses"]
    if most and layers > 1 and slots < layers * experts:
        assert slow.counters["prefetch_used"] and slow.counters["prefetch_wasted"]


@pytest.mark.parametrize("lines", [1, 2, 8, 16])
@pytest.mark.parametrize("programs", [1, 3, 40])
def test_gather_moves_every_byte_and_no_other(programs: int, lines: int) -> None:
    """Slabs of nine lines in slots of eleven, which no block divides."""
    dice = torch.Generator().manual_seed(programs * lines)
    slabs = torch.randint(0, 256, (4, NBYTES), dtype=torch.uint8, generator=dice)
    arena = torch.full((7, 11 * 16), 0xEE, dtype=torch.uint8)
    expected = arena.clone()
    for which, slot in ((2, 5), (0, 0), (3, 6)):
        expected[slot, :NBYTES] = slabs[which]
    sources = torch.tensor([slabs[i].data_ptr() for i in (2, 0, 3, 1)])
    targets = torch.tensor([5, 0, 6, 3], dtype=torch.int32)
    into = arena.view(-1).view(torch.int32)
    for length, after in ((0, torch.full_like(arena, 0xEE)), (3, expected)):
        listed = torch.tensor([length], dtype=torch.int32)
        kernels.gather[(programs,)](sources, targets, listed, into, 9, 11, LINES=lines)
        assert torch.equal(arena, after)


def test_verify_counts_the_pairs_whose_slot_is_not_theirs() -> None:
    ids = torch.tensor([[3, NOBODY, 1], [0, NOBODY, 2]])
    owner = torch.tensor([5 + 3, 5 + 1, 5 + 2, NOBODY], dtype=torch.int32)
    counters = torch.zeros(16, dtype=torch.int64)
    for slots, violations in (
        ([[0, -1, 1], [-1, -1, 2]], 1),  # expert 0 has no slot
        ([[0, -1, 1], [3, -1, 2]], 1),  # ... or one that is nobody's
        ([[0, 0, 2], [-1, -1, 1]], 4),
    ):
        counters.zero_()
        there = torch.tensor(slots, dtype=torch.int32)
        kernels.verify[(1,)](ids, there, 1, 6, owner, counters, EXPERTS=5, PAIRS=8)
        assert int(counters[kernels.VIOLATIONS.value]) == violations
        assert int(counters.sum()) == violations


def test_the_kernels_compile_without_a_device_and_move_lines_whole() -> None:
    """In a process of its own: here they are interpreted."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, script], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
