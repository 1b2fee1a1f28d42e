"""Asks later layers' own routers about the current router input.

Knows: router modules, and what they were called with in this forward. Does not know: what to do
with the answer. It never re-implements a router; a router it cannot call that way is left out and
the reason kept (`unavailable`).

A router is some ten small operations: 0.2 ms between experts that have emptied the caches. Most
routers pick the largest entries of one product, and a guess needs no more than that. Where the
product alone has been seen to pick what the router itself picks (`_Shortcut`), the products of all
later layers are asked in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from understudy.core import Forward

Scored = tuple[Sequence[Sequence[int]], Sequence[Sequence[float]]]
Products = Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]


class Lookahead:
    """``routers``: per MoE layer, the router module, or ``None`` where there is none to call.
    ``products``: (x [1, H], matrices) -> [1, all lines], where there is something quick."""

    def __init__(
        self, routers: Sequence[torch.nn.Module | None], products: Products | None = None
    ) -> None:
        self.routers = routers
        self.unavailable: dict[int, str] = {
            layer: "no router module beside the experts"
            for layer, router in enumerate(routers)
            if router is None
        }
        self._shortcut = None if products is None else _Shortcut(routers, products)

    def ask(
        self, forward: Forward | None, layer: int, depth: int, rows: torch.Tensor | None
    ) -> dict[int, Scored]:
        """Later MoE layer -> (ids, weights) per real token and rank, up to ``depth`` layers on."""
        if forward is None or layer not in forward.router_args:
            return {}
        args, kwargs = forward.router_args[layer]
        end = min(layer + depth + 1, len(self.routers))
        asked = [later for later in range(layer + 1, end) if later not in self.unavailable]
        shortcut = self._shortcut if rows is None and _one_token(args, kwargs) else None
        answers = shortcut.ask(asked, args[0]) if shortcut else {}
        for later in asked:
            if later not in answers:
                answer = self._call(later, args, kwargs, rows)
                if answer is not None:
                    answers[later] = answer
                    if shortcut:
                        shortcut.compare(later, args[0], answer[0][0])
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


# ---------------------------------------------------------------------------------- the short way


def _one_token(args: Any, kwargs: Any) -> bool:
    """Whether a router was called with one token and nothing else."""
    if len(args) != 1 or kwargs or not isinstance(args[0], torch.Tensor):
        return False
    x = args[0]
    return x.numel() == x.shape[-1] and x.is_contiguous()


class _Shortcut:
    """Products in place of routers, each where both picked the same for `TOKENS` tokens, but for
    `DIFFERENT` of the experts: a product may round another way, and a guess may be wrong."""

    TOKENS = 16
    DIFFERENT = 1 / 16

    def __init__(self, routers: Sequence[torch.nn.Module | None], products: Products) -> None:
        self._routers, self._products = routers, products
        self._compared: dict[int, list[int]] = {}  # not decided: tokens, experts, different ones
        self._matrices: dict[int, torch.Tensor] = {}
        for layer, router in enumerate(routers):
            matrix = getattr(router, "weight", None)
            if isinstance(matrix, torch.Tensor) and matrix.ndim == 2 and matrix.is_contiguous():
                self._matrices[layer] = matrix
                self._compared[layer] = [0, 0, 0]
        self._picks: dict[int, int] = {}  # passed -> how many experts the router picks

    def ask(self, layers: Sequence[int], x: torch.Tensor) -> dict[int, Scored]:
        """The answers for those of ``layers`` that passed, about one token."""
        passed = [layer for layer in layers if layer in self._picks]
        if not passed:
            return {}
        matrices = [self._matrices[layer] for layer in passed]
        logits = self._products(x.view(1, -1), matrices)
        answers: dict[int, Scored] = {}
        kept, start = x.clone(), 0  # the memory of x is used again after this event
        for layer, matrix in zip(passed, matrices, strict=True):
            end = start + len(matrix)
            ids = logits[:, start:end].topk(self._picks[layer]).indices.tolist()
            answers[layer] = ids, _Weights(self._routers[layer], kept)
            start = end
        return answers

    def compare(self, layer: int, x: torch.Tensor, picked: Sequence[int]) -> None:
        """The router of ``layer`` has picked these: what would its product have said?"""
        count = self._compared.get(layer)
        if count is None:
            return
        matrix = self._matrices[layer]
        if matrix.shape[1] != x.shape[-1] or matrix.dtype != x.dtype:
            del self._compared[layer]
            return
        own = self._products(x.view(1, -1), [matrix]).topk(len(picked)).indices.tolist()[0]
        count[0] += 1
        count[1] += len(picked)
        count[2] += len(set(picked) - set(own))
        if count[0] == self.TOKENS:
            del self._compared[layer]
            if count[2] <= self.DIFFERENT * count[1]:
                self._picks[layer] = len(picked)


class _Weights(Sequence[Sequence[float]]):
    """What the router itself says, for the few minds that read more than its choice."""

    def __init__(self, router: Any, x: torch.Tensor) -> None:
        self._router, self._x = router, x

    def _rows(self) -> list[list[float]]:
        with torch.no_grad():
            rows: list[list[float]] = _choice(self._router.forward(self._x))[1].float().tolist()
        return rows

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: Any) -> Any:
        return self._rows()[index]

    def __iter__(self) -> Iterator[list[float]]:
        return iter(self._rows())
