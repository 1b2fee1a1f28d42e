"""How much of a layer's choice each way of looking ahead has from the layer before.

Knows: foresights, `Lookahead` (the code that runs in the engine asks here too), and what the router
chose in the end. Does not know: text, profiles.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from understudy.experts.foresight import Foresight, NotForeseen
from understudy.experts.lookahead import Lookahead
from understudy.experts.runtime import Seen
from understudy.learn.count import router_input

COSINES = ("router-input", "drift", "quasi")


@dataclass(slots=True)
class Mean:
    total: float = 0.0
    count: int = 0

    def add(self, values: torch.Tensor) -> None:
        self.total += float(values.double().sum())
        self.count += len(values)

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass(slots=True)
class Tally:
    """Of one name and layer: the share of the chosen experts that was guessed, and of their
    weight."""

    recall: Mean = field(default_factory=Mean)
    weighted: Mean = field(default_factory=Mean)

    def add(self, guess: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        """guess [T, any], ids and weights [T, k]."""
        right = (ids.unsqueeze(-1) == guess.unsqueeze(1)).any(-1)
        self.recall.add(right.double().mean(-1))
        self.weighted.add((right * weights).sum(-1) / weights.sum(-1))


class Recall:
    """Watches forwards without padding. ``foresights``: name -> foresight, ``None`` for the plain
    way; ``uses``: [L, E] of the text that was learned from, for popularity."""

    def __init__(
        self,
        routers: Sequence[torch.nn.Module | None],
        foresights: Mapping[str, Foresight | None],
        norms: Mapping[int, torch.nn.Module],
        uses: torch.Tensor,
    ) -> None:
        self.layers, self.uses, self.foresights = len(routers), uses, foresights
        for one in foresights.values():
            if one is not None:
                one.norms.update(norms)
        self.lookaheads = {n: Lookahead(routers, None, f) for n, f in foresights.items()}
        names = (*foresights, "popularity", "last-token")
        self.tallies = {name: [Tally() for _ in routers] for name in names}
        self.cosines = {name: [Mean() for _ in routers] for name in COSINES if name in foresights}
        self._guesses: dict[str, torch.Tensor] = {}
        self._asked: dict[str, torch.Tensor] = {}

    def __call__(self, seen: Seen) -> None:
        layer = seen.event.layer
        ids, weights = torch.tensor(seen.event.ids), torch.tensor(list(seen.event.weights))
        if layer:
            self._compare(layer, ids, weights, router_input(seen))
        popular = self.uses[layer].topk(ids.shape[1]).indices
        self.tallies["popularity"][layer].add(popular.expand(len(ids), -1), ids, weights)
        self.tallies["last-token"][layer].add(ids[:-1], ids[1:], weights[1:])
        self._guesses, self._asked = {}, {}
        if layer + 1 < self.layers:
            self._foresee(seen)

    def _compare(
        self, layer: int, ids: torch.Tensor, weights: torch.Tensor, s: torch.Tensor | None
    ) -> None:
        for name, guess in self._guesses.items():
            self.tallies[name][layer].add(guess, ids, weights)
        for name, asked in self._asked.items():
            if s is not None and asked.shape == s.shape:
                self.cosines[name][layer].add(F.cosine_similarity(asked.float(), s.float()))

    def _foresee(self, seen: Seen) -> None:
        """What the layer after this one is guessed to choose, and what its router is asked."""
        later = seen.event.layer + 1
        for name, lookahead in self.lookaheads.items():
            found = lookahead.ask(seen.forward, seen.event, 1, None)
            if later in found:
                self._guesses[name] = torch.tensor(found[later][0])
        for name in self.cosines:
            asked = asked_about(self.foresights[name], seen)
            if asked is not None:
                self._asked[name] = asked

    # -------------------------------------------------------------------------------- the answers

    def recall(self, name: str) -> list[float | None]:
        return [tally.recall.value for tally in self.tallies[name]]

    def weighted(self, name: str) -> list[float | None]:
        return [tally.weighted.value for tally in self.tallies[name]]


def asked_about(foresight: Foresight | None, seen: Seen) -> torch.Tensor | None:
    """[T, H]: what the router of the next layer is asked about; ``None``: it cannot be."""
    if foresight is None:
        return router_input(seen)
    assert seen.forward is not None
    try:
        layer = seen.event.layer
        found = foresight.router_input(seen.forward, layer, layer + 1, seen.event)
    except NotForeseen:
        return None
    return found.reshape(-1, found.shape[-1])
