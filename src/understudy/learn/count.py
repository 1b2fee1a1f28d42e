"""What routing and experts do on the text that is learned from: counts and means.

Knows: what the runtime shows of each event (`Seen`). Does not know: text, profiles, who asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log

import torch

from understudy.experts.runtime import Seen


class Counts:
    """Watches forwards without padding and adds up. ``experts``: how many each MoE layer has;
    ``width``: of an expert's output, known at the first event."""

    def __init__(self, experts: Sequence[int]) -> None:
        self.experts = experts
        layers, most = len(experts), max(experts)
        self.uses = torch.zeros(layers, most, dtype=torch.int64)
        self.coactivation = torch.zeros(layers, most, most, dtype=torch.int64)
        self._sums: list[torch.Tensor | None] = [None] * layers
        self._entropies: list[list[torch.Tensor]] = [[] for _ in experts]
        self._changes: list[torch.Tensor | None] = [None] * layers
        self._changed = 0
        self._before: torch.Tensor | None = None  # the router's input of the layer before
        self.norms: dict[int, torch.nn.Module] = {}

    def __call__(self, seen: Seen) -> None:
        layer = seen.event.layer
        ids, weights = torch.tensor(seen.event.ids), torch.tensor(list(seen.event.weights))
        self._count(layer, ids)
        self._add_outputs(layer, ids, seen.out)
        self._entropies[layer].append(entropy(weights))
        self._follow(layer, seen)
        if seen.forward is not None and layer in seen.forward.residuals:
            self.norms[layer] = seen.forward.residuals[layer][0]

    def _count(self, layer: int, ids: torch.Tensor) -> None:
        most = self.uses.shape[1]
        chosen = torch.zeros(len(ids), most).scatter_(1, ids, 1.0)
        both = (chosen.T @ chosen).long()  # fewer than 2**24 tokens: exact
        self.uses[layer] += both.diagonal()
        self.coactivation[layer] += both.fill_diagonal_(0)

    def _add_outputs(self, layer: int, ids: torch.Tensor, out: torch.Tensor) -> None:
        sums = self._sums[layer]
        if sums is None:
            sums = torch.zeros(self.uses.shape[1], out.shape[-1], dtype=torch.float64)
            self._sums[layer] = sums
        sums.index_add_(0, ids.flatten(), out.flatten(0, 1).double())

    def _follow(self, layer: int, seen: Seen) -> None:
        """The change of the router's input since the layer before."""
        now = router_input(seen)
        if layer == 0:
            self._before, self._changed = None, self._changed + len(seen.event.ids)
        if now is not None and self._before is not None and now.shape == self._before.shape:
            change = (now.double() - self._before.double()).sum(0)
            known = self._changes[layer - 1]
            self._changes[layer - 1] = change if known is None else known + change
        self._before = now

    # -------------------------------------------------------------------------------- the answers

    def default_vectors(self, smoothing: float) -> torch.Tensor:
        """[L, E, H]: each expert's mean output, as if it had given the mean of its layer
        ``smoothing`` times more."""
        known = [sums for sums in self._sums if sums is not None]
        made = torch.zeros(*self.uses.shape, known[0].shape[1], dtype=torch.float64)
        for layer, (sums, uses) in enumerate(zip(self._sums, self.uses, strict=True)):
            if sums is not None:
                own = self.experts[layer]
                mean = sums.sum(0) / uses.sum()
                count = uses[:own, None] + smoothing
                vectors = (sums[:own] + smoothing * mean) / count
                made[layer, :own] = torch.where(count > 0, vectors, mean)
        return made.float()

    def residual_vectors(self) -> torch.Tensor | None:
        """[L, H], the last row zero; ``None`` where a layer's router could not be followed."""
        rows = [row for row in self._changes[:-1] if row is not None]
        if not rows or len(rows) < len(self.experts) - 1:
            return None
        return (torch.stack([*rows, torch.zeros_like(rows[0])]) / self._changed).float()

    def entropy_percentiles(self) -> torch.Tensor:
        """[L, 101]"""
        shares = torch.linspace(0, 1, 101, dtype=torch.float64)
        rows = [percentiles(torch.cat(found).double(), shares) for found in self._entropies]
        return torch.stack(rows).float()

    def rare(self, below: float) -> list[int]:
        """Per layer, how many experts were chosen by fewer tokens."""
        pairs = zip(self.uses, self.experts, strict=True)
        return [int((uses[:own] < below).sum()) for uses, own in pairs]


def router_input(seen: Seen) -> torch.Tensor | None:
    """[T, H] of the layer of this event; ``None`` where its router was not seen."""
    forward = seen.forward
    if forward is None or seen.event.layer not in forward.router_args:
        return None
    args = forward.router_args[seen.event.layer][0]
    found: torch.Tensor = args[0]
    return found.reshape(-1, found.shape[-1])


def entropy(weights: torch.Tensor) -> torch.Tensor:
    """[T, k] -> [T]: what `policies.buddy.entropy` says of each row."""
    k = weights.shape[1]
    if k == 1:
        return torch.zeros(len(weights), dtype=torch.float64)
    shares = weights.double() / weights.double().sum(-1, keepdim=True)
    nats: torch.Tensor = torch.special.entr(shares.clamp_min(0)).sum(-1)
    return nats / log(k)


def percentiles(values: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """Between neighbours in a straight line (torch's own quantile stops at 2**24 values)."""
    ordered = values.sort().values
    place = shares * (len(ordered) - 1)
    low = place.floor().long()
    high = (low + 1).clamp_max(len(ordered) - 1)
    return torch.lerp(ordered[low], ordered[high], place - low)
