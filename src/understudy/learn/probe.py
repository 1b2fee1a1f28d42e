"""Experiments on the model: all experts on the same tokens, and a layer without its last rank.

Knows: the runtime's seam, the director's route. Does not know: text, profiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from understudy.core import NOBODY, LayerEvent
from understudy.experts.runtime import Runtime, Seen
from understudy.policies import Exactness, Residency, RouteTransform

ENOUGH = 8  # tokens of an expert, for a mean over its own tokens
ROWS_AT_ONCE = 64  # rows of logits turned into probabilities at a time: vocabularies are large

Report = Callable[[int, int], None]  # (done, in all)

# --------------------------------------------------------------------------------- the same tokens


class Sample:
    """Keeps some tokens of every layer: what its experts were given, and who was chosen.
    ``wanted``: number of the window -> positions in it."""

    def __init__(self, layers: int, wanted: Mapping[int, Sequence[int]]) -> None:
        self.wanted, self.window = wanted, 0
        self._x: list[list[torch.Tensor]] = [[] for _ in range(layers)]
        self._ids: list[list[torch.Tensor]] = [[] for _ in range(layers)]

    def __call__(self, seen: Seen) -> None:
        layer, wanted = seen.event.layer, list(self.wanted.get(self.window, ()))
        if wanted:
            self._x[layer].append(seen.x[wanted].clone())
            self._ids[layer].append(torch.tensor([list(seen.event.ids[i]) for i in wanted]))
        if layer == len(self._x) - 1:
            self.window += 1

    def __getitem__(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """x [n, H] and ids [n, k]."""
        return torch.cat(self._x[layer]), torch.cat(self._ids[layer])


def similarity(
    runtime: Runtime, sample: Sample, experts: Sequence[int], report: Report
) -> tuple[torch.Tensor, list[int]]:
    """[L, E, E], and per layer how many rows are over all tokens, for want of own ones."""
    most = max(experts)
    found, poor = torch.zeros(len(experts), most, most), []
    for layer, own in enumerate(experts):
        x, ids = sample[layer]
        out = F.normalize(all_outputs(runtime, layer, x, own, ids.shape[1]).float(), dim=-1)
        rows = [_row(out, (ids == expert).any(-1), expert) for expert in range(own)]
        found[layer, :own, :own] = torch.stack([cosines for cosines, _ in rows])
        poor.append(sum(1 for _, few in rows if few))
        report(layer + 1, len(experts))
    return found, poor


def _row(out: torch.Tensor, chosen: torch.Tensor, expert: int) -> tuple[torch.Tensor, bool]:
    """[E]: the mean cosine with every expert, and whether the expert had too few tokens."""
    few = int(chosen.sum()) < ENOUGH
    mine = out if few else out[chosen]
    return torch.einsum("teh,th->te", mine, mine[:, expert]).mean(0), few


def all_outputs(
    runtime: Runtime, layer: int, x: torch.Tensor, experts: int, at_once: int
) -> torch.Tensor:
    """[T, E, H]: what every expert makes of x [T, H], ``at_once`` of them per call of the seam."""
    seen: list[torch.Tensor] = []
    with watched(runtime, lambda s: seen.append(s.out.clone())), torch.no_grad():
        for first in range(0, experts, at_once):
            ids = torch.arange(first, min(first + at_once, experts)).expand(len(x), -1)
            runtime(layer, x, ids, torch.zeros(ids.shape, dtype=x.dtype))
    return torch.cat(seen, 1)


@contextmanager
def watched(runtime: Runtime, watch: Callable[[Seen], None]) -> Iterator[None]:
    runtime.watch = watch
    try:
        yield
    finally:
        runtime.watch = None


# ------------------------------------------------------------------------- without the last rank


class _WithoutLast(RouteTransform):
    """In one layer the lightest rank of every token runs nobody, in prompts too."""

    exactness = Exactness.LOSSY

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    def transform(self, event: LayerEvent, book: Residency) -> LayerEvent:
        if event.layer != self.layer:
            return event
        ids, weights = [list(row) for row in event.ids], [list(row) for row in event.weights]
        for row, heavy in zip(ids, weights, strict=True):
            last = max(range(len(row)), key=lambda rank: (-heavy[rank], rank))
            row[last], heavy[last] = NOBODY, 0.0
        return replace(event, ids=ids, weights=weights)


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Nats per token and layer, and over how many tokens."""

    nats: torch.Tensor
    tokens: int


def sensitivity(
    logits: Callable[[Sequence[int]], torch.Tensor], runtime: Runtime, layers: int,
    windows: Sequence[Sequence[int]], report: Report,
) -> Sensitivity:  # fmt: skip
    """KL(exact || one layer without its last rank). ``logits``: a window -> [T, vocabulary]."""
    director = runtime.director
    usual, sums, done = director.route, torch.zeros(layers, dtype=torch.float64), 0
    for window in windows:
        exact = logits(window)
        for layer in range(layers):
            director.route = _WithoutLast(layer)
            try:
                sums[layer] += kl(exact, logits(window))
            finally:
                director.route = usual
            done += 1
            report(done, layers * len(windows))
    tokens = sum(map(len, windows))
    return Sensitivity((sums / tokens).float(), tokens)


def kl(exact: torch.Tensor, other: torch.Tensor) -> float:
    """Summed over rows."""
    total = 0.0
    for a, b in zip(*(torch.split(x, ROWS_AT_ONCE) for x in (exact, other)), strict=True):
        p, q = (x.float().log_softmax(-1) for x in (a, b))
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
    return total


def keeps_logits(model: Any) -> bool:
    """Whether a forward can be told for how many tokens logits are wanted."""
    from inspect import signature

    return "logits_to_keep" in signature(model.forward).parameters
