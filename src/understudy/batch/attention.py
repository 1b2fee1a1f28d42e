"""Attention over a packed batch: every sequence over its own keys and values, on any device.

Knows: transformers' attention interface. Does not know: who the sequences are, or where their keys
and values lie (`packing`).

transformers' own paged attention computes all queries against the keys of all sequences under a
mask, unless flash attention is there. On a CPU that is the batch size times too much, and the sums
of one sequence depend on its neighbours. Here the numbers of a sequence are its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface

from understudy.batch.packing import Step

PACKED = "understudy-packed"  # transformers makes no mask for an attention that it has none for


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    cache: Step | None = None,
    s_aux: torch.Tensor | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query [1, heads, T, D], key and value [1, kv heads, T, D] -> [1, T, heads, D].

    ``s_aux``: a logit per head for "nothing" (attention sinks). Raises where it would have to leave
    something out.
    """
    if cache is None or position_bias is not None:
        raise RuntimeError("this attention is made for packed batches over a paged cache")
    layer: int = module.layer_idx  # type: ignore[assignment]
    pages = cache.pages(layer)
    parts = [
        _one(query[:, :, part.queries], _by_head(part.key), _by_head(part.value),
             scaling, pages.window, s_aux, softcap)
        for part in pages.parts(layer, key[0].transpose(0, 1), value[0].transpose(0, 1))
    ]  # fmt: skip
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


def _by_head(tokens: torch.Tensor) -> torch.Tensor:
    """[K, heads, D] -> [1, heads, K, D]"""
    return tokens.transpose(0, 1).unsqueeze(0)


AttentionInterface.register(PACKED, attend)


def _one(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None, window: int | None,
    sinks: torch.Tensor | None, softcap: float | None,
) -> torch.Tensor:  # fmt: skip
    """One sequence: its queries are the last of its positions."""
    queries, keys = q.shape[2], k.shape[2]
    far = window is not None and keys > window
    if sinks is None and softcap is None:
        if queries == 1 and not far:
            return _one_token(q, k, v, scaling)
        causal = queries == keys and not far  # half of the work, and what a plain forward does
        mask = None if causal else _mask(queries, keys, window, q.device)
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=grouped
        )
    mask = _mask(queries, keys, window, q.device)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is None:
        return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ v
    nothing = sinks.reshape(1, -1, 1, 1).expand(1, -1, q.shape[2], 1).to(scores.dtype)
    chances = torch.cat([scores, nothing], dim=-1).softmax(-1, dtype=torch.float32)
    return chances[..., :-1].to(q.dtype) @ v


def _one_token(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float | None
) -> torch.Tensor:
    """Heads that share keys, as if they were positions: a tenth of the time."""
    grouped = q.reshape(1, k.shape[1], q.shape[1] // k.shape[1], -1)
    out = F.scaled_dot_product_attention(grouped, k, v, scale=scaling)
    return out.reshape(1, q.shape[1], 1, -1)


def _mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """[queries, keys]: which key each query may see."""
    distance = (
        torch.arange(keys - queries, keys, device=device)[:, None]
        - torch.arange(keys, device=device)[None, :]
    )
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)
