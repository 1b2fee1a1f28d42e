"""Counts as the publisher of the Qwen3 trace counted, to be compared with their curve.

Knows: events, evictors, bytes per expert. Does not know: slots, plans, any clock. Two things differ
from the engine's accounting, and both flatter a small cache:

* the budget is bytes, filled with experts of any size; the engine has slots of one size
* a running event may exceed the budget: what it misses comes in first, and when all of it is there
  others leave until the budget holds again. The engine makes room before it reads.

Found by trying on that trace, and then read in the publisher's own replay script
(Helldez/BigMoeOnEdge, scripts/route-replay.py). Evictors are the engine's own: their `lru` is
`lru-global` here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from understudy.core import ExpertId, LayerEvent, Phase
from understudy.policies import Evictor
from understudy.simulate.replay import evictor_named
from understudy.simulate.run import Sizes


@dataclass(slots=True)
class Counted:
    """Hit rates as 0..1; ``bytes_read`` of the whole trace."""

    lookups: int = 0
    hits: int = 0
    decode_lookups: int = 0
    decode_hits: int = 0
    bytes_read: int = 0

    @property
    def hit_rate(self) -> float:
        return self.hits / self.lookups if self.lookups else 0.0

    @property
    def hit_rate_decode(self) -> float:
        return self.decode_hits / self.decode_lookups if self.decode_lookups else 0.0


def published(events: Sequence[LayerEvent], *, sizes: Sizes, budget: int, evictor: str) -> Counted:
    """What ``evictor`` would have hit with ``budget`` bytes, by the rules above."""
    slots = max(1, budget // sizes.largest)  # a hint for evictors that divide slots among layers
    cache = _Bytes(evictor_named(evictor, events, slots, sizes.layers), sizes, budget)
    for event in events:
        cache.event(event)
    return cache.counted


class _Bytes:
    """A cache that holds as many experts as fit, whatever their sizes."""

    def __init__(self, evictor: Evictor, sizes: Sizes, budget: int) -> None:
        self.evictor, self.sizes, self.budget = evictor, sizes, budget
        self.resident: set[ExpertId] = set()
        self.held = 0
        self.counted = Counted()

    def event(self, event: LayerEvent) -> None:
        needed = [ExpertId(event.layer, e) for e in event.needed()]
        missing = [e for e in needed if e not in self.resident]
        self._count(event, len(needed), missing)
        for expert in missing:
            self.evictor.admit(expert, speculative=False)
        self.resident.update(missing)
        self.held += sum(map(self.sizes.of, missing))
        self.evictor.touch(event, needed)
        self._shrink(event.layer, set(needed))

    def _count(self, event: LayerEvent, lookups: int, missing: Sequence[ExpertId]) -> None:
        c, hits = self.counted, lookups - len(missing)
        c.lookups += lookups
        c.hits += hits
        c.bytes_read += sum(map(self.sizes.of, missing))
        if event.phase is Phase.DECODE:
            c.decode_lookups += lookups
            c.decode_hits += hits

    def _shrink(self, layer: int, keep: set[ExpertId]) -> None:
        """Others leave until the budget holds, or nobody else is left."""
        over = self.held - self.budget
        if over <= 0:
            return
        leaving: dict[ExpertId, None] = {}
        for victim in self.evictor.victims(layer, 1 + over // min(self.sizes.nbytes)):
            if victim not in keep and victim not in leaving:
                leaving[victim] = None
                over -= self.sizes.of(victim)
                if over <= 0:
                    break
        for victim in leaving:
            self.evictor.remove(victim)
            self.resident.discard(victim)
            self.held -= self.sizes.of(victim)
