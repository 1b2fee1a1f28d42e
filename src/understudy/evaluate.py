"""How far one way of running a model is from another: NLL, KL, agreement, on the same text.

Knows: two loaded models, token ids, next-token distributions. Does not know: what makes the models
differ. The windows of a text are scored each in one forward: a *format* changes no step by what is
in the cache, so scoring step by step would give the same (policies that look at residency need it:
`quality`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

WINDOW = 512  # tokens scored in one forward, at most
BLOCK = 32  # tokens that stay together when the bootstrap draws: neighbours are not independent
DRAWS = 2000
ROWS_AT_ONCE = 64  # rows of logits turned into probabilities at a time: vocabularies are large

Report = Callable[[int, int], None]  # (done, in all)


@dataclass(frozen=True, slots=True)
class Distance:
    """Nats per token. ``delta_low`` and ``delta_high``: 95 % interval of the difference, by a
    bootstrap over pairs. ``kl``: of the other distribution from the exact one."""

    tokens: int
    nll_exact: float
    nll: float
    delta_nll: float
    delta_low: float
    delta_high: float
    kl: float
    same_top1: float


@dataclass(frozen=True, slots=True)
class TokenScores:
    """One number per token: both NLLs, the KL, whether both like the same token best."""

    exact: np.ndarray
    other: np.ndarray
    kl: np.ndarray
    same: np.ndarray


def distance(
    exact: Any,
    other: Any,
    ids: Sequence[int],
    window: int = WINDOW,
    report: Report = lambda done, total: None,
) -> Distance:
    """Score ``ids`` under both models. The first token of each window is only read."""
    starts = [s for s in range(0, len(ids), window) if len(ids) - s >= 2]
    scored = []
    for number, start in enumerate(starts):
        tokens = torch.tensor(ids[start : start + window])
        scored.append(_window(exact, other, tokens))
        report(number + 1, len(starts))
    if not scored:
        raise ValueError("a text of at least two tokens is needed")
    return _summary(
        TokenScores(
            *(
                np.concatenate([getattr(s, f) for s in scored])
                for f in ("exact", "other", "kl", "same")
            )
        )
    )


def _window(exact: Any, other: Any, tokens: torch.Tensor) -> TokenScores:
    with torch.inference_mode():
        logits = [_logits(model, tokens)[:-1] for model in (exact, other)]
        return compared(logits[0], logits[1], tokens[1:])


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """[T, V] in host memory."""
    there = tokens[None].to(getattr(model, "device", "cpu"))
    out: torch.Tensor = model(input_ids=there, use_cache=False).logits[0]
    return out.cpu()


def compared(exact: torch.Tensor, other: torch.Tensor, following: torch.Tensor) -> TokenScores:
    """Logits [T, V] of both and the tokens [T] that followed; a few rows at a time."""
    parts = [
        _rows(a.float(), b.float(), tokens)
        for a, b, tokens in zip(
            *(torch.split(t, ROWS_AT_ONCE) for t in (exact, other, following)), strict=True
        )
    ]
    return TokenScores(*(torch.cat(column).double().numpy() for column in zip(*parts, strict=True)))


def _rows(
    a: torch.Tensor, b: torch.Tensor, following: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    nll, other = (-x.gather(1, following[:, None])[:, 0] for x in (p, q))
    # What the exact run rules out (-inf) weighs nothing, whatever the other one makes of it.
    kl = (p.exp() * (p - q)).where(p > -torch.inf, 0.0).sum(-1)
    return nll, other, kl, (a.argmax(-1) == b.argmax(-1)).float()


def _summary(s: TokenScores) -> Distance:
    low, high = _interval(s.other - s.exact)
    return Distance(
        tokens=len(s.exact),
        nll_exact=float(s.exact.mean()),
        nll=float(s.other.mean()),
        delta_nll=float((s.other - s.exact).mean()),
        delta_low=low,
        delta_high=high,
        kl=float(s.kl.mean()),
        same_top1=float(s.same.mean()),
    )


def _interval(differences: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of the means of resampled blocks; the same every time."""
    blocks = [differences[i : i + BLOCK] for i in range(0, len(differences), BLOCK)]
    sums = np.array([block.sum() for block in blocks])
    sizes = np.array([len(block) for block in blocks])
    drawn = np.random.default_rng(0).integers(0, len(blocks), (DRAWS, len(blocks)))
    means = sums[drawn].sum(1) / sizes[drawn].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
