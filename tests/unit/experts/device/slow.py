"""The rules of `understudy.experts.device.decide`, in lists and dicts: slow and obvious."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from understudy.core import NOBODY

Ids = Sequence[Sequence[int]]


class Slow:
    """``pools``: the slots of each layer. Nobody is resident at first."""

    def __init__(self, pools: Sequence[Sequence[int]], nbytes: int) -> None:
        self.pools, self.nbytes = pools, nbytes
        self.slot_of: dict[tuple[int, int], int] = {}
        self.owner_of: dict[int, tuple[int, int]] = {}
        self.last_use = {slot: 0 for pool in pools for slot in pool}
        self.unused: set[int] = set()
        self.now = 1
        self.counters: Counter[str] = Counter()

    def decide(self, layer: int, ids: Ids) -> tuple[list[list[int]], list[tuple[int, int]]]:
        """The slot of every pair, and (expert, slot) of every load."""
        pairs = [expert for row in ids for expert in row]
        last = {expert: i for i, expert in enumerate(pairs) if expert != NOBODY}
        in_order = sorted(last, key=last.__getitem__)
        missing = [e for e in in_order if (layer, e) not in self.slot_of]
        for expert in in_order:
            if expert not in missing:
                slot = self.slot_of[layer, expert]
                self.last_use[slot] = self.now + last[expert]
                self.counters["prefetch_used"] += slot in self.unused
                self.unused.discard(slot)
        loads = []
        for expert in missing:
            own = {self.slot_of.get((layer, e)) for e in last}
            slot = self._oldest([s for s in self.pools[layer] if s not in own], layer)
            self._evict(slot)
            self._seat(layer, expert, slot)
            self.last_use[slot] = self.now + last[expert]
            loads.append((expert, slot))
        self.now += len(pairs)
        self.counters["events"] += 1
        self.counters["hits"] += len(last) - len(missing)
        self.counters["misses"] += len(missing)
        self.counters["demand_bytes"] += len(missing) * self.nbytes
        return [[self.slot_of.get((layer, e), -1) for e in row] for row in ids], loads

    def guess(self, layer: int, ids: Ids, most: int) -> list[tuple[int, int]]:
        """(expert, slot) of every speculative load; they are seated by `commit`."""
        by_rank = [row[rank] for rank in range(len(ids[0])) for row in ids]
        foreseen = list(dict.fromkeys(e for e in by_rank if e != NOBODY))
        own = {self.slot_of.get((layer, e)) for e in foreseen}
        may = [s for s in self.pools[layer] if s not in own]
        loads = []
        for expert in [e for e in foreseen if (layer, e) not in self.slot_of][:most]:
            if may:
                slot = self._oldest(may, layer)
                may.remove(slot)
                self._evict(slot)
                loads.append((expert, slot))
        self.counters["prefetch_issued"] += len(loads)
        self.counters["prefetch_bytes"] += len(loads) * self.nbytes
        return loads

    def commit(self, layer: int, loads: Sequence[tuple[int, int]]) -> None:
        for expert, slot in loads:
            self._seat(layer, expert, slot)
            self.unused.add(slot)

    def _oldest(self, slots: Sequence[int], layer: int) -> int:
        return min(slots, key=lambda s: (self.last_use[s], self.pools[layer].index(s)))

    def _seat(self, layer: int, expert: int, slot: int) -> None:
        self.slot_of[layer, expert], self.owner_of[slot] = slot, (layer, expert)

    def _evict(self, slot: int) -> None:
        if slot in self.owner_of:
            del self.slot_of[self.owner_of.pop(slot)]
            self.counters["evictions"] += 1
        if slot in self.unused:
            self.unused.remove(slot)
            self.counters["prefetch_wasted"] += 1
            self.counters["wasted_bytes"] += self.nbytes
