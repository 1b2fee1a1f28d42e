"""A control that changes as much as what it controls for: another transform, held to a rate.

Knows: events before and after the other transform. Does not know: what it does, bytes, queues.

The gates of `buddy` see the same in all its controls, but what they let through is not the same: a
buddy must be resident, leaving out needs nobody. Only at one count do their losses compare.
"""

from __future__ import annotations

from zlib import crc32

from understudy.core import LayerEvent, Phase
from understudy.policies import RouteTransform
from understudy.policies.residency import Residency


class AtRate(RouteTransform):
    """Lets ``inner`` change ``rate`` experts per decoded token: on average, all layers together.

    Each change it would make is made with the same chance, by a seeded draw: the rate as a share of
    what it offered so far, a little more after too few changes and less after too many. Where it
    offers less than ``rate``, all of it is made, and the count shows the rest.
    """

    def __init__(self, inner: RouteTransform, rate: float) -> None:
        super().__init__(
            layers=inner.layers, experts=inner.experts, learned=inner.learned, seed=inner.seed
        )
        self.inner, self.rate = inner, rate
        self.exactness = inner.exactness
        self.wants_scores, self.wants_foretold = inner.wants_scores, inner.wants_foretold
        self._due = 0.0  # changes that the rate has allowed so far
        self._offered = self._made = 0

    def transform(self, event: LayerEvent, book: Residency) -> LayerEvent:
        other = self.inner.transform(event, book)
        if event.phase is not Phase.DECODE:
            return other
        self._due += self.rate / self.layers * len(event.ids)
        changes = changed(event, other)
        self._offered += changes
        if not changes or self._draw() >= self._chance():
            return event
        self._made += changes
        return other

    def _chance(self) -> float:
        patience = 2 * self.rate + 8  # changes by which it may be behind before it doubles
        behind = max(-1.0, min(1.0, (self._due - self._made) / patience))
        return self._due / self._offered * (1 + behind)

    def _draw(self) -> float:
        """0..1, the same every time."""
        return crc32(repr((self.seed, self._offered)).encode()) / 2**32


def changed(asked: LayerEvent, runs: LayerEvent) -> int:
    """(token, rank) pairs whose expert does not run for that token, as the runtime counts them."""
    if runs is asked:
        return 0
    rows = zip(asked.ids, runs.ids, strict=True)
    return sum(e not in new for old, new in rows for e in old)
