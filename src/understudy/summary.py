"""What a trace says about a model's routing, layer by layer.

Knows: recorded events. Does not know: files, policies, how it is shown.

A layer's tokens are taken in order, each text by itself. *Uniform* is what a router would give that
draws its k experts of E without looking.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import log
from statistics import mean, median

from understudy.core import NOBODY
from understudy.trace import Trace

TOP = 4  # partners whose share of all co-activation is told


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """``used``: share of experts chosen at least once. ``overlap``: share of a token's experts that
    the token before used too, and what chance gives. ``entropy``: of the use of experts, in nats,
    and as a share of ln E. ``gap``: tokens from one use of an expert to its next (1: the next
    token). ``stack``: different experts used in between, itself included: a cache of that many
    experts for this layer, least recently used leaving first, would have had it. ``partners``:
    share of an expert's co-activations that go to its `TOP` most frequent partners, mean over
    uses, and what chance gives. Each gap and stack as (median, 90th percentile)."""

    layer: int
    tokens: int
    used: float
    overlap: float
    overlap_uniform: float
    entropy: float
    entropy_share: float
    gap: tuple[float, float]
    stack: tuple[float, float]
    partners: float
    partners_uniform: float


def summarise(trace: Trace) -> list[LayerSummary]:
    """One summary per MoE layer that the trace holds tokens of."""
    texts: dict[int, dict[int, list[Sequence[int]]]] = {}
    for event, sequence in zip(trace.events, trace.sequences, strict=True):
        rows = texts.setdefault(event.layer, {}).setdefault(sequence, [])
        rows += [[e for e in row if e != NOBODY] for row in event.ids]
    return [
        _layer(layer, trace.shape.experts[layer], list(texts[layer].values()))
        for layer in sorted(texts)
    ]


def overall(layers: Sequence[LayerSummary]) -> dict[str, float]:
    """Means over layers, of what has a mean."""
    names = (
        "used", "overlap", "overlap_uniform", "entropy_share", "partners", "partners_uniform",
    )  # fmt: skip
    return {name: mean(getattr(one, name) for one in layers) for name in names}


def _layer(layer: int, experts: int, texts: Sequence[Sequence[Sequence[int]]]) -> LayerSummary:
    rows = [row for text in texts for row in text]
    uses = Counter(e for row in rows for e in row)
    total = sum(uses.values())
    entropy = -sum(n / total * log(n / total) for n in uses.values())
    pairs = [pair for text in texts for pair in pairwise(text)]
    gaps, stacks = _distances(texts)
    top, chance = _partners(rows, uses, experts)
    return LayerSummary(
        layer=layer,
        tokens=len(rows),
        used=len(uses) / experts,
        overlap=_mean(len({*now} & {*before}) / len(now) for before, now in pairs),
        overlap_uniform=_mean(len(before) / experts for before, _ in pairs),
        entropy=entropy,
        entropy_share=entropy / log(experts) if experts > 1 else 0.0,
        gap=_spread(gaps),
        stack=_spread(stacks),
        partners=top,
        partners_uniform=chance,
    )


def _distances(texts: Iterable[Sequence[Sequence[int]]]) -> tuple[list[int], list[int]]:
    """Of every repeated use: tokens since the last one, and different experts since it."""
    gaps: list[int] = []
    stacks: list[int] = []
    for text in texts:
        last: dict[int, int] = {}  # expert -> moment of its last use; moments count every use
        token: dict[int, int] = {}
        order: list[int] = []  # the moments in `last`, ascending
        moment = 0
        for number, row in enumerate(text):
            for expert in row:
                if expert in last:
                    gaps.append(number - token[expert])
                    place = bisect_left(order, last[expert])
                    stacks.append(len(order) - place)
                    del order[place]
                last[expert], token[expert] = moment, number
                insort(order, moment)
                moment += 1
    return gaps, stacks


def _partners(
    rows: Sequence[Sequence[int]], uses: Counter[int], experts: int
) -> tuple[float, float]:
    together: dict[int, Counter[int]] = {}
    for row in rows:
        for a, b in combinations(row, 2):
            together.setdefault(a, Counter())[b] += 1
            together.setdefault(b, Counter())[a] += 1
    if not together:
        return 0.0, 0.0
    shares = [
        (uses[e], sum(n for _, n in c.most_common(TOP)) / c.total()) for e, c in together.items()
    ]
    weight = sum(n for n, _ in shares)
    return sum(n * s for n, s in shares) / weight, min(1.0, TOP / (experts - 1))


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return mean(found) if found else 0.0


def _spread(values: Sequence[int]) -> tuple[float, float]:
    """(median, 90th percentile); zeros where nothing was used twice."""
    if not values:
        return 0.0, 0.0
    return float(median(values)), float(sorted(values)[min(len(values) - 1, len(values) * 9 // 10)])
