"""What a trace says about a model's routing, layer by layer and over all layers.

Knows: recorded events. Does not know: files, policies, how it is shown.

A layer's tokens are taken in order, each text by itself; a prompt counts token by token, though an
engine looks it up at once. *Chance* is a router that draws experts without looking at the token. It
draws as many tokens as the trace has: what few tokens do by accident is not mistaken for habit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from understudy.core import NOBODY
from understudy.trace import Trace

TOP = 4  # partners whose share of all co-activation is told
PIECE = 2048  # tokens of a text that are looked at together
SEED = 0  # of what chance draws

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Spread = tuple[float, float]  # median, 90th percentile


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """``layer``: ``None`` is all layers: means over layers, but ``tokens`` is a sum, and gaps and
    stacks are those of all uses. A mean that has nothing to stand on is ``nan``.

    ``used``: share of experts chosen at least once.
    ``overlap``: share of a token's experts that the token before used too; ``overlap_uniform``: if
    every expert were as likely; ``overlap_any``: of two tokens of the layer picked at random, so
    that overlap beyond it is a matter of time and not of popularity.
    ``entropy``: of the use of experts, in nats, and as a share of ln E.
    ``gap``: tokens from one use of an expert to its next (1: the next token).
    ``stack``: LRU stack distance: a cache of that many experts for this layer, least recently used
    leaving first, and no fewer than a token needs, would have had it.
    ``partners``: share of an expert's co-activations that go to its `TOP` most frequent partners,
    mean over uses; ``partners_uniform``: if every expert were as likely; ``partners_popular``: if
    experts were as popular as here, and chosen without regard to each other."""

    layer: int | None
    tokens: int
    used: float
    overlap: float
    overlap_uniform: float
    overlap_any: float
    entropy: float
    entropy_share: float
    gap: Spread
    stack: Spread
    partners: float
    partners_uniform: float
    partners_popular: float


@dataclass(frozen=True, slots=True)
class Summary:
    """One per MoE layer that the trace holds tokens of, and one of all."""

    layers: tuple[LayerSummary, ...]
    overall: LayerSummary


def summarise(trace: Trace) -> Summary:
    """The figures of a trace that holds at least one event."""
    found, gaps, stacks = [], [], []
    for layer, texts in sorted(_by_layer(trace).items()):
        distances = [_distances(text, trace.shape.experts[layer]) for text in texts]
        gap, stack = (np.concatenate(values) for values in zip(*distances, strict=True))
        found.append(_layer(layer, trace.shape.experts[layer], texts, gap, stack))
        gaps.append(gap)
        stacks.append(stack)
    return Summary(tuple(found), _overall(found, np.concatenate(gaps), np.concatenate(stacks)))


def _by_layer(trace: Trace) -> dict[int, list[Ints]]:
    """MoE layer -> per text, [tokens, ranks]: experts, `NOBODY` where a rank has none."""
    rows: dict[int, dict[int, list[Sequence[int]]]] = {}
    for event, sequence in zip(trace.events, trace.sequences, strict=True):
        rows.setdefault(event.layer, {}).setdefault(sequence, []).extend(event.ids)
    return {layer: [_matrix(text) for text in texts.values()] for layer, texts in rows.items()}


def _matrix(rows: Sequence[Sequence[int]]) -> Ints:
    width = max(map(len, rows), default=0)
    if any(len(row) != width for row in rows):
        rows = [[*row, *[NOBODY] * (width - len(row))] for row in rows]
    return np.array(rows, dtype=np.int64).reshape(len(rows), width)


def _layer(
    layer: int, experts: int, texts: Sequence[Ints], gaps: Ints, stacks: Ints
) -> LayerSummary:
    chosen = [_one_hot(text, experts) for text in texts]
    every = np.concatenate(chosen)
    uses, sizes = every.sum(0), every.sum(1)
    share = uses[uses > 0] / max(1.0, uses.sum())
    entropy = float(-(share * np.log(share)).sum())
    before = np.concatenate([one[:-1] for one in chosen])
    now = np.concatenate([one[1:] for one in chosen])
    some = now.sum(1) > 0
    common = (before * now).sum(1)[some] / now.sum(1)[some]
    dice = np.random.default_rng((SEED, layer))
    return LayerSummary(
        layer=layer,
        tokens=len(every),
        used=float((uses > 0).mean()),
        overlap=_mean(common),
        overlap_uniform=_mean(before.sum(1)[some] / experts),
        overlap_any=_overlap_of_any(every),
        entropy=entropy,
        entropy_share=entropy / np.log(experts) if experts > 1 else 1.0,
        gap=_spread(gaps),
        stack=_spread(stacks),
        partners=_partners(every),
        partners_uniform=_partners(_drawn(dice, sizes, np.ones(experts))),
        partners_popular=_partners(_drawn(dice, sizes, _odds(uses, sizes))),
    )


def _overall(layers: Sequence[LayerSummary], gaps: Ints, stacks: Ints) -> LayerSummary:
    told = ("layer", "tokens", "gap", "stack")
    names = [name for name in LayerSummary.__slots__ if name not in told]
    means: dict[str, Any] = {n: _mean(np.array([getattr(o, n) for o in layers])) for n in names}
    tokens = sum(one.tokens for one in layers)
    return LayerSummary(
        layer=None, tokens=tokens, gap=_spread(gaps), stack=_spread(stacks), **means
    )


def _one_hot(text: Ints, experts: int) -> Floats:
    """[tokens, experts]: 1 where the token chose the expert."""
    found = np.zeros((len(text), experts))
    token, rank = np.nonzero(text != NOBODY)
    found[token, text[token, rank]] = 1
    return found


def _overlap_of_any(every: Floats) -> float:
    """Mean over all ordered pairs of different tokens, of the share of the second's experts that
    the first chose too."""
    every = every[every.sum(1) > 0]
    if len(every) < 2:
        return float("nan")
    others = every.sum(0) - every  # how many other tokens chose each expert
    return float(((others * every).sum(1) / every.sum(1)).mean() / (len(every) - 1))


# ---------------------------------------------------------------------------------------- distances


def _distances(text: Ints, experts: int) -> tuple[Ints, Ints]:
    """Of every repeated use in one text: tokens since the last one, and the place of the expert in
    the order of last uses when its token looks its experts up (1: the very last).

    All experts of a token are looked up before any of them counts as used, as the engine does; of
    one token, the last rank is used last."""
    gaps: list[Ints] = []
    stacks: list[Ints] = []
    for start, rows, last in _moments(text, experts):
        token, rank = np.nonzero(rows != NOBODY)
        own = last[token, rows[token, rank]]
        token, own = token[own > 0], own[own > 0]
        gaps.append(start + token - (own - 1) // max(1, text.shape[1]))
        stacks.append((last[token] >= own[:, None]).sum(1))
    return np.concatenate(gaps), np.concatenate(stacks)


def _moments(text: Ints, experts: int) -> Iterator[tuple[int, Ints, Ints]]:
    """(first token, tokens, [tokens, experts]: the moment of each expert's last use before that
    token, counted from 1; 0: none), piece by piece."""
    carried = np.zeros(experts, dtype=np.int64)
    for start in range(0, max(1, len(text)), PIECE):
        rows = text[start : start + PIECE]
        used = np.zeros((len(rows) + 1, experts), dtype=np.int64)
        used[0] = carried
        token, rank = np.nonzero(rows != NOBODY)
        used[token + 1, rows[token, rank]] = (start + token) * text.shape[1] + rank + 1
        last = np.maximum.accumulate(used)
        carried = last[-1]
        yield start, rows, last[:-1]


# ---------------------------------------------------------------------------------------- partners


def _partners(every: Floats) -> float:
    """Mean over uses, of the share of an expert's co-activations that its `TOP` partners have."""
    together = every.T @ every
    uses = together.diagonal().copy()
    np.fill_diagonal(together, 0)
    whole = together.sum(1)
    top = np.sort(together, axis=1)[:, -TOP:].sum(1)
    some = whole > 0
    if not some.any():
        return float("nan")
    return float((uses[some] * top[some] / whole[some]).sum() / uses[some].sum())


def _drawn(dice: np.random.Generator, sizes: Floats, odds: Floats) -> Floats:
    """As many tokens of as many experts each, drawn by ``odds`` without regard to each other: the
    largest of ln(odds) + Gumbel noise are a draw without replacement."""
    found = np.zeros((len(sizes), len(odds)))
    if not len(sizes):
        return found
    with np.errstate(divide="ignore"):
        keys = np.log(odds) + dice.gumbel(size=found.shape)
    most = int(sizes.max())
    largest = np.argpartition(-keys, min(most, len(odds) - 1), axis=1)[:, :most]
    order = np.argsort(-np.take_along_axis(keys, largest, 1), axis=1)
    taken = np.arange(most) < sizes[:, None]
    np.put_along_axis(found, np.take_along_axis(largest, order, 1), taken.astype(float), axis=1)
    return found


def _odds(uses: Floats, sizes: Floats) -> Floats:
    """Odds at which drawing without replacement uses the experts about as often as ``uses``.

    Such a draw is a race: an expert of odds o arrives at an exponential time of rate o, and the
    first k are taken. Stopped at time 1, it has arrived with probability 1 - exp(-o): its share of
    the tokens, and these sum to k."""
    share = np.minimum(uses / max(1, len(sizes)), 1 - 0.5 / max(1, len(sizes)))
    found: Floats = -np.log1p(-share)
    return found


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _spread(values: Ints) -> Spread:
    if not len(values):
        return float("nan"), float("nan")
    middle, high = np.percentile(values, (50, 90))
    return float(middle), float(high)
