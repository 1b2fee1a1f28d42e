"""Asks later layers' own routers about the current router input.

Knows: router modules, and what they were called with in this forward. Does not know: what to do
with the answer. It never re-implements a router; a router it cannot call that way is left out and
the reason kept (`unavailable`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from understudy.core import Forward

Scored = tuple[list[list[int]], list[list[float]]]


class Lookahead:
    """``routers``: per MoE layer, the router module, or ``None`` where there is none to call."""

    def __init__(self, routers: Sequence[torch.nn.Module | None]) -> None:
        self.routers = routers
        self.unavailable: dict[int, str] = {
            layer: "no router module beside the experts"
            for layer, router in enumerate(routers)
            if router is None
        }

    def ask(
        self, forward: Forward | None, layer: int, depth: int, rows: torch.Tensor | None
    ) -> dict[int, Scored]:
        """Later MoE layer -> (ids, weights) per real token and rank, up to ``depth`` layers on."""
        if forward is None or layer not in forward.router_args:
            return {}
        args, kwargs = forward.router_args[layer]
        answers = {}
        for later in range(layer + 1, min(layer + depth, len(self.routers) - 1) + 1):
            if later not in self.unavailable:
                answer = self._call(later, args, kwargs, rows)
                if answer is not None:
                    answers[later] = answer
        return answers

    def _call(self, later: int, args: Any, kwargs: Any, rows: torch.Tensor | None) -> Scored | None:
        router = self.routers[later]
        assert router is not None
        try:
            # .forward, not the call: hooks of transformers' own recorders must not fire twice.
            ids, weights = _choice(router.forward(*args, **kwargs))
            if rows is not None:
                ids, weights = ids[rows], weights[rows]
            return ids.tolist(), weights.float().tolist()
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as e:
            self.unavailable[later] = f"{type(router).__name__}: {e}"
            return None


def _choice(answer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights out of a router's answer: the last integer tensor [T, k] and the float
    tensor of the same shape (families differ in what else they return)."""
    tensors = [t for t in answer if isinstance(t, torch.Tensor)]
    ids = [t for t in tensors if not t.is_floating_point()][-1].flatten(0, -2)
    for t in reversed(tensors):
        if t.is_floating_point() and t.flatten(0, -2).shape == ids.shape:
            return ids, t.flatten(0, -2)
    return ids, torch.ones_like(ids, dtype=torch.float32)
