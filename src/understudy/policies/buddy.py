"""BuddyMoE (arXiv 2511.10054): a resident expert runs in place of a missing one.

Knows: the event with the router's scores, the residency book, what a profile says of who is chosen
together and whose outputs are alike. Does not know: bytes, queues. Lossy, counted by the runtime.

    token gate    a token whose choice is clear (low entropy) is not touched
    batch gate    an event that misses most of its experts is not touched
    score         of buddy j for expert i: q(j|i) (1 + eta z_j); the best resident one stands in
    limits        nobody twice for one token, at most rho stand-ins per token, else fetched

Where the paper is silent we chose, and say so: stand-ins replace the lightest experts first; z_j is
the router's probability of j as a share of the token's largest; experts on their way count as
resident; prompts are left alone. There is one device, so the paper's hop factor is 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import log
from typing import Any
from zlib import crc32

from understudy.core import NOBODY, ExpertId, LayerEvent, Phase, UnderstudyError
from understudy.policies import Exactness, RouteTransform
from understudy.policies.residency import Residency

STAND_INS = ("coactivation", "similar", "random", "drop")
WEIGHTS = ("missing", "own")


class Buddy(RouteTransform):
    """``rho``: stand-ins per token, at most; ``beta``: at this share of missing experts and above,
    none; 0 of either is exact. ``percentile``: of the layer's calibrated entropy, at or below which
    a token is not touched (0: no gate). ``alpha``, ``cap``: a buddy list is the shortest with this
    mass, and no longer than that. ``stand_in``: who, the last two are controls. ``weight``: the
    stand-in carries the missing expert's, or its own by the router, with the token's sum kept.
    """

    exactness = Exactness.LOSSY
    wants_scores = True

    def __init__(
        self, *, rho: int = 3, beta: float = 0.6, percentile: int = 15, alpha: float = 0.9,
        cap: int = 16, eta: float = 0.5, stand_in: str = "coactivation", weight: str = "missing",
        **context: Any,
    ) -> None:  # fmt: skip
        super().__init__(**context)
        if stand_in not in STAND_INS or weight not in WEIGHTS:
            raise UnderstudyError(
                f"buddy: stand_in is one of {', '.join(STAND_INS)}; weight one of "
                f"{', '.join(WEIGHTS)}; not {stand_in} and {weight}"
            )
        if self.learned is None and (percentile or stand_in in STAND_INS[:2]):
            raise UnderstudyError(
                "route buddy needs a profile of this model: make one with `understudy profile` and "
                "pass it as --profile"
            )
        self.rho, self.beta, self.percentile, self.eta = rho, beta, percentile, eta
        self.stand_in, self.weight = stand_in, weight
        self._buddies = [
            [_buddies(row, own, alpha, cap) for own, row in enumerate(table)]
            for table in self._tables()
        ]

    def _tables(self) -> Sequence[Sequence[Sequence[float]]]:
        if self.learned is None or self.stand_in not in STAND_INS[:2]:
            return ()
        similar = self.stand_in == "similar"
        return self.learned.similarity if similar else self.learned.coactivation

    def transform(self, event: LayerEvent, book: Residency) -> LayerEvent:
        if event.phase is not Phase.DECODE or self.rho <= 0:
            return event
        needed = [ExpertId(event.layer, e) for e in event.needed()]
        missing = {e.expert for e in needed if e not in book}
        if not missing or len(missing) >= self.beta * len(needed):
            return event
        assert event.scores is not None, "the runtime gives scores to who wants them"
        old = [(list(ids), list(w)) for ids, w in zip(event.ids, event.weights, strict=True)]
        new = [
            self._token(event, book, missing, *row, scores)
            for row, scores in zip(old, event.scores, strict=True)
        ]
        if new == old:
            return event
        return replace(event, ids=[ids for ids, _ in new], weights=[w for _, w in new])

    def _token(
        self, event: LayerEvent, book: Residency, missing: set[int],
        ids: list[int], weights: list[float], scores: Sequence[float],
    ) -> tuple[list[int], list[float]]:  # fmt: skip
        if self._is_sensitive(event.layer, weights):
            return ids, weights
        ids, weights, total, left = list(ids), list(weights), sum(weights), self.rho
        for rank in sorted(range(len(ids)), key=weights.__getitem__):
            if left and ids[rank] in missing:
                stand_in = self._pick(event, book, ids, ids[rank], scores)
                if stand_in is not None:
                    left, ids[rank] = left - 1, stand_in
                    weights[rank] = 0.0 if stand_in == NOBODY else weights[rank]
        if self.weight == "own" and left < self.rho:
            own = [0.0 if e == NOBODY else scores[e] for e in ids]
            weights = [total * w / sum(own) for w in own] if sum(own) else weights
        return ids, weights

    def _is_sensitive(self, layer: int, weights: Sequence[float]) -> bool:
        """The token gate: the choice among the k experts is clear."""
        if not self.percentile or self.learned is None:
            return False
        return entropy(weights) <= self.learned.entropy[layer][self.percentile]

    def _pick(
        self, event: LayerEvent, book: Residency, used: Sequence[int], expert: int,
        scores: Sequence[float],
    ) -> int | None:  # fmt: skip
        layer = event.layer
        if self.stand_in == "drop":
            return NOBODY
        if self.stand_in == "random":
            here = [e for e in range(len(scores)) if ExpertId(layer, e) in book and e not in used]
            drawn = crc32(repr((self.seed, event.step, layer, expert)).encode())
            return here[drawn % len(here)] if here else None
        most = max(scores)
        best = max(
            ((q * (1 + self.eta * scores[j] / most), -j) for j, q in self._buddies[layer][expert]
             if j not in used and ExpertId(layer, j) in book),
            default=None,
        )  # fmt: skip
        return None if best is None else -best[1]


def entropy(weights: Sequence[float]) -> float:
    """0..1: of the renormalised weights of the k experts, as a share of ln k."""
    total = sum(weights)
    shares = [w / total for w in weights if w > 0]
    return -sum(p * log(p) for p in shares) / log(len(weights)) if len(weights) > 1 else 0.0


def _buddies(row: Sequence[float], own: int, alpha: float, cap: int) -> list[tuple[int, float]]:
    """Peers of expert ``own`` with their share q(j|i), likeliest first: the shortest list that has
    ``alpha`` of the mass."""
    return list(_until(alpha, _shares(row, own)))[:cap]


def _shares(row: Sequence[float], own: int) -> list[tuple[int, float]]:
    peers = [(j, max(0.0, x)) for j, x in enumerate(row) if j != own]
    total = sum(x for _, x in peers)
    return sorted(((j, x / total) for j, x in peers if x > 0), key=lambda p: -p[1])


def _until(mass: float, shares: Sequence[tuple[int, float]]) -> Iterator[tuple[int, float]]:
    reached = 0.0
    for peer, share in shares:
        if reached >= mass:
            return
        reached += share
        yield peer, share
