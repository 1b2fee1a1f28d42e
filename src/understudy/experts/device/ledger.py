"""The residency book of a device that decides for itself: its arrays, and how the host hands the
cache over and takes it back.

Knows: experts, slots, least-recently-used order, the arrays of `decide`. Does not know: streams,
kernels, bytes of experts. The host writes the arrays once, in `Ledger.adopt`, and reads them
rarely: what happens between is the device's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from understudy.core import NOBODY, Counters, ExpertId
from understudy.experts.device import Device

MOST_PAIRS = 64  # (token, rank) pairs of one event, and entries of a copy list
COUNTED = (
    "events",
    "hits",
    "misses",
    "evictions",
    "demand_bytes",
    "prefetch_issued",
    "prefetch_bytes",
    "prefetch_used",
    "prefetch_wasted",
    "wasted_bytes",
)  # the first counters of `decide`, as fields of `core.Counters`; then come the violations
COUNTERS = 16
ALIGNED = 256


def fewest_slots(layers: int, experts: int, pairs: int) -> int:
    """How many slots hold what any one event can need, in every layer at once."""
    return layers * min(experts, pairs)


def quotas(layers: int, experts: int, slots: int) -> list[int]:
    """Slots of each layer's pool: equal, the first layers one more where it does not divide."""
    share, rest = divmod(slots, layers)
    return [min(experts, share + (layer < rest)) for layer in range(layers)]


def power_of_two(n: int) -> int:
    """The smallest that is not less: Triton's arrays have no other lengths."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True, slots=True)
class CopyList:
    """What the next gather moves: from ``sources`` int64 [64], addresses, to ``targets`` int32
    [64], slots, the first ``length`` int32 [1] of them. ``names`` int32 [64]: layer * E + expert,
    of a guess."""

    sources: torch.Tensor
    targets: torch.Tensor
    names: torch.Tensor
    length: torch.Tensor


class Ledger:
    """The arrays that `decide` describes, in one allocation. Owned by whoever launches kernels;
    every method here asks the stream in use, after all that was asked before."""

    def __init__(self, device: Device, addresses: torch.Tensor, slots: int) -> None:
        """``addresses``: int64 [L, E], where each expert lies in pinned host memory."""
        self.device, self.slots = device, slots
        self.layers, self.experts = addresses.shape
        self.capacity = power_of_two(max(quotas(self.layers, self.experts, slots)))
        small, large = torch.int32, torch.int64
        room = _Room()
        room.ask("addresses", large, self.layers, self.experts)
        room.ask("table", small, self.layers, self.experts)
        room.ask("pool", small, self.layers, self.capacity)
        room.ask("size", small, self.layers)
        room.ask("owner", small, slots)
        room.ask("fresh", small, slots)
        room.ask("stamp", large, slots)
        room.ask("guard", large, slots)
        room.ask("clock", large, 1)
        room.ask("counters", large, COUNTERS)
        for name in ("demand", "guessed"):
            room.ask(f"{name}.sources", large, MOST_PAIRS)
            room.ask(f"{name}.targets", small, MOST_PAIRS)
            room.ask(f"{name}.names", small, MOST_PAIRS)
            room.ask(f"{name}.length", small, 1)
        self._arrays = room.take(device)
        self.addresses, self.table = self._arrays["addresses"], self._arrays["table"]
        self.pool, self.size = self._arrays["pool"], self._arrays["size"]
        self.owner, self.fresh = self._arrays["owner"], self._arrays["fresh"]
        self.stamp, self.guard = self._arrays["stamp"], self._arrays["guard"]
        self.clock, self.counters = self._arrays["clock"], self._arrays["counters"]
        self.demand, self.guessed = self._list("demand"), self._list("guessed")
        self._write("addresses", addresses.flatten().tolist())
        self._write("counters", [0] * COUNTERS)

    def adopt(self, residents: Mapping[ExpertId, int], free: Sequence[int]) -> list[ExpertId]:
        """Take over a cache: who is in which slot, least recently used first, and the free slots.
        Layers above their quota give up their least recent; who had to leave is returned."""
        if sorted([*residents.values(), *free]) != list(range(self.slots)):
            raise ValueError(f"a ledger adopts each of its {self.slots} slots once")
        pools, left = _shared_out(residents, free, quotas(self.layers, self.experts, self.slots))
        # Lists, because a tensor takes long to fill one by one.
        table = [NOBODY] * (self.layers * self.experts)
        owner, stamp = [NOBODY] * self.slots, [0] * self.slots
        gone = set(left)
        for time, (expert, slot) in enumerate(residents.items(), start=1):
            if expert not in gone:
                owner[slot] = expert.layer * self.experts + expert.expert
                table[owner[slot]] = slot
                stamp[slot] = time
        self._write("table", table)
        self._write("pool", [n for row in pools for n in row + [0] * (self.capacity - len(row))])
        self._write("size", [len(places) for places in pools])
        self._write("owner", owner)
        self._write("stamp", stamp)
        self._write("fresh", [0] * self.slots)
        self._write("guard", [0] * self.slots)
        self._write("clock", [len(residents) + 1])
        return left

    def residents(self) -> list[tuple[ExpertId, int]]:
        """Who is in which slot, least recently used first. The host waits."""
        owners, stamps = self.device.fetch(self.owner, self.stamp)
        held = sorted((t, s) for s, t in enumerate(stamps) if owners[s] != NOBODY)
        return [(ExpertId(*divmod(owners[slot], self.experts)), slot) for _, slot in held]

    def count(self) -> tuple[Counters, int]:
        """All that was counted since the start, and how often a slot did not hold the expert asked
        for. The host waits."""
        (found,) = self.device.fetch(self.counters)
        return Counters(**dict(zip(COUNTED, found, strict=False))), found[len(COUNTED)]

    def _list(self, name: str) -> CopyList:
        of = (self._arrays[f"{name}.{part}"] for part in ("sources", "targets", "names", "length"))
        return CopyList(*of)

    def _write(self, name: str, values: Sequence[int]) -> None:
        to = self._arrays[name]
        self.device.compute.copy(to, torch.tensor(values, dtype=to.dtype).view(to.shape))


def _shared_out(
    residents: Mapping[ExpertId, int], free: Sequence[int], quota: Sequence[int]
) -> tuple[list[list[int]], list[ExpertId]]:
    """The slots of each layer's pool, and who must leave for it."""
    held: list[list[tuple[ExpertId, int]]] = [[] for _ in quota]
    for expert, slot in residents.items():
        held[expert.layer].append((expert, slot))
    left, spare = [], list(free)
    for layer, most in enumerate(quota):
        too_many = max(0, len(held[layer]) - most)
        left += [expert for expert, _ in held[layer][:too_many]]
        spare += [slot for _, slot in held[layer][:too_many]]
        del held[layer][:too_many]
    pools = [[slot for _, slot in layer] for layer in held]
    for places, most in zip(pools, quota, strict=True):
        missing = most - len(places)
        places += spare[:missing]
        del spare[:missing]
    return pools, left


class _Room:
    """Several arrays in one allocation, each on a line of its own."""

    def __init__(self) -> None:
        self._asked: dict[str, tuple[int, torch.dtype, tuple[int, ...]]] = {}
        self._end = 0

    def ask(self, name: str, dtype: torch.dtype, *shape: int) -> None:
        self._asked[name] = (self._end, dtype, shape)
        self._end += -(-prod(shape) * dtype.itemsize // ALIGNED) * ALIGNED

    def take(self, device: Device) -> dict[str, torch.Tensor]:
        memory = device.allocate(self._end)
        return {
            name: memory[start : start + prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for name, (start, dtype, shape) in self._asked.items()
        }
