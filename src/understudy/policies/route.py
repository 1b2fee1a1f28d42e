"""Who runs: the router's choice, or by name somebody else.

Knows: the event, what look-ahead said of it, the residency book. Does not know: bytes, queues. The
only room that may change which expert runs; whoever does so is lossy, and counted by the runtime.
Prompts are always routed as they ask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from understudy.core import ExpertId, LayerEvent, Phase
from understudy.policies import Exactness, RouteTransform
from understudy.policies.residency import Residency


class AsRouted(RouteTransform):
    """The router decides."""

    def transform(self, event: LayerEvent, book: Residency) -> LayerEvent:
        return event


class Speculated(RouteTransform):
    """Speculative execution: the experts that were foretold run, with the foretold weights.

    The router's own answer counts for nothing; errors chain from layer to layer. A layer of which
    nothing was foretold (the first) runs as routed. Speculating Experts (arXiv 2603.19289), 3.
    """

    exactness = Exactness.LOSSY
    wants_foretold = True

    def transform(self, event: LayerEvent, book: Residency) -> LayerEvent:
        if event.foretold is None or event.phase is not Phase.DECODE:
            return event
        ids, weights = event.foretold
        return replace(event, ids=[list(row) for row in ids], weights=[list(w) for w in weights])


class Verified(RouteTransform):
    """The router decides; a foretold expert stands in for a missing one that weighs little.

    ``below``: the dial, as a share of the token's weight; 0 is exact. A stand-in is resident or on
    its way, was foretold for the same token, is not used by it yet, and takes over the weight of
    the missing expert. Ours.
    """

    exactness = Exactness.LOSSY
    wants_foretold = True

    def __init__(self, *, below: float = 0.15, **context: Any) -> None:
        super().__init__(**context)
        self.below = below

    def transform(self, event: LayerEvent, book: Residency) -> LayerEvent:
        if event.foretold is None or event.phase is not Phase.DECODE or self.below <= 0:
            return event
        rows = [
            self._stand_in(event, book, ids, weights, foretold)
            for ids, weights, foretold in zip(
                event.ids, event.weights, event.foretold[0], strict=True
            )
        ]
        changed = any(new != list(old) for new, old in zip(rows, event.ids, strict=True))
        return replace(event, ids=rows, weights=list(event.weights)) if changed else event

    def _stand_in(
        self,
        event: LayerEvent,
        book: Residency,
        ids: Sequence[int],
        weights: Sequence[float],
        foretold: Sequence[int],
    ) -> list[int]:
        ids, most = list(ids), self.below * sum(weights)
        able = [e for e in foretold if e not in ids and ExpertId(event.layer, e) in book]
        for rank in sorted(range(len(ids)), key=weights.__getitem__):
            missing = ExpertId(event.layer, ids[rank]) not in book
            if able and missing and weights[rank] < most:
                ids[rank] = able.pop(0)
        return ids
