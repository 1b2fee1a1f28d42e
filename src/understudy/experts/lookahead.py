"""Asks later layers' own routers about the current router input, or what a `Foresight` makes of it.

Knows: router modules, and what they were called with in this forward. Does not know: what to do
with the answer. It never re-implements a router; a router it cannot call that way is left out and
the reason kept (`unavailable`).

A router is some ten small operations: 0.2 ms between experts that have emptied the caches. Most
routers pick the largest entries of one product, and a guess needs no more than that. Where the
product alone has been seen to pick what the router itself picks (`_Shortcut`), the products of all
later layers are asked in one call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from understudy.core import Forward, LayerEvent
from understudy.experts.foresight import Foresight, NotForeseen

Scored = tuple[Sequence[Sequence[int]], Sequence[Sequence[float]]]
Products = Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]


class Lookahead:
    """``routers``: per MoE layer, the router module, or ``None`` where there is none to call.
    ``products``: (x [1, H], matrices) -> [1, all lines], where there is something quick.
    ``foresight``: what routers are asked about instead of the current router input."""

    def __init__(
        self,
        routers: Sequence[torch.nn.Module | None],
        products: Products | None = None,
        foresight: Foresight | None = None,
    ) -> None:
        self.routers, self.foresight = routers, foresight
        self.unavailable: dict[int, str] = {
            layer: "no router module beside the experts"
            for layer, router in enumerate(routers)
            if router is None
        }
        self.unforeseen: dict[int, str] = {}  # layers that the foresight could not see last time
        self._shortcut = None if products is None else _Shortcut(routers, products)

    def start(self, forward: Forward | None, layer: int, depth: int) -> dict[int, torch.Tensor]:
        """Later MoE layer -> ids [1, k] where the model is, about one token, for those layers where
        a product stands for the router. Launched and not waited for: who reads the current ids
        reads these with them, and hands them to `ask`."""
        if self._shortcut is None or self.foresight is not None:
            return {}
        if forward is None or layer not in forward.router_args:
            return {}
        args, kwargs = forward.router_args[layer]
        if not _one_token(args, kwargs):
            return {}
        return self._shortcut.start(self._later(layer, depth), args[0])

    def _later(self, layer: int, depth: int) -> list[int]:
        end = min(layer + depth + 1, len(self.routers))
        return [later for later in range(layer + 1, end) if later not in self.unavailable]

    def ask(
        self, forward: Forward | None, event: LayerEvent, depth: int, rows: torch.Tensor | None,
        started: Mapping[int, Sequence[Sequence[int]]] | None = None,
    ) -> dict[int, Scored]:  # fmt: skip
        """Later MoE layer -> (ids, weights) per real token and rank, up to ``depth`` layers on.
        ``event``: the current one, as it is carried out. ``started``: what `start` found, read."""
        layer = event.layer
        if forward is None or layer not in forward.router_args:
            return {}
        asked = self._later(layer, depth)
        if self.foresight is not None:
            self.foresight.learn_norm(forward, layer)
            return self._foresee(self.foresight, forward, event, asked)
        args, kwargs = forward.router_args[layer]
        shortcut = self._shortcut if rows is None and _one_token(args, kwargs) else None
        if shortcut and started is None:
            started = {n: ids.tolist() for n, ids in shortcut.start(asked, args[0]).items()}
        answers = shortcut.answers(started or {}, args[0]) if shortcut else {}
        for later in asked:
            if later not in answers:
                answer = self._call(later, args, kwargs, rows)
                if answer is not None:
                    answers[later] = answer
                    if shortcut:
                        shortcut.compare(later, args[0], answer[0][0])
        return answers

    def next_ids(self, forward: Forward | None, layer: int) -> torch.Tensor | None:
        """[T, k] where the model is, largest weight first: what the router of the next layer says
        about the current one's input. The host waits for nothing. ``None``: not available."""
        later = layer + 1
        if forward is None or layer not in forward.router_args or later in self.unavailable:
            return None
        args, kwargs = forward.router_args[layer]
        router = self.routers[later]
        assert router is not None
        return _choice(router.forward(*args, **kwargs))[0]

    def _foresee(
        self, foresight: Foresight, forward: Forward, event: LayerEvent, asked: Sequence[int]
    ) -> dict[int, Scored]:
        answers: dict[int, Scored] = {}
        for later in asked:
            try:
                x = foresight.router_input(forward, event.layer, later, event)
            except NotForeseen as e:  # for now: norms are seen as layers run
                self.unforeseen[later] = str(e)
                continue
            self.unforeseen.pop(later, None)
            logits = foresight.logits(later, x)
            args, kwargs = forward.router_args[event.layer]
            if logits is not None:
                answers[later] = _likeliest(logits, event)
            elif answer := self._call(later, (x.view_as(args[0]), *args[1:]), kwargs, None):
                answers[later] = answer
        return answers

    def scores(self, forward: Forward | None, layer: int, rows: Any) -> list[list[float]] | None:
        """[T][E]: the probability of every expert by the layer's own router; ``None``: no router to
        ask."""
        chances = self.chances(forward, layer)
        if chances is None:
            return None
        found: list[list[float]] = (chances if rows is None else chances[rows]).tolist()
        return found

    def chances(self, forward: Forward | None, layer: int) -> torch.Tensor | None:
        """[T, E], padding too. Asks the router again: families differ in what they hand to their
        experts."""
        if forward is None or layer not in forward.router_args or self.routers[layer] is None:
            return None
        router: Any = self.routers[layer]
        args, kwargs = forward.router_args[layer]
        answer = router.forward(*args, **kwargs)
        tensors = [t for t in _tensors(answer) if t.is_floating_point()]
        widest = max(tensors, key=lambda t: t.shape[-1]).flatten(0, -2).float()
        return widest if _are_chances(widest) else widest.softmax(-1)

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
    tensors = _tensors(answer)
    ids = [t for t in tensors if not t.is_floating_point()][-1].flatten(0, -2)
    for t in reversed(tensors):
        if t.is_floating_point() and t.flatten(0, -2).shape == ids.shape:
            return ids, t.flatten(0, -2)
    return ids, torch.ones_like(ids, dtype=torch.float32)


def _tensors(answer: Any) -> list[torch.Tensor]:
    parts = (answer,) if isinstance(answer, torch.Tensor) else answer
    return [t for t in parts if isinstance(t, torch.Tensor)]


def _are_chances(x: torch.Tensor) -> bool:
    """Whether the rows are probabilities already; some routers hand out those, others logits."""
    return bool((x >= 0).all()) and bool(((x.sum(-1) - 1).abs() < 0.02).all())


def _likeliest(logits: torch.Tensor, event: LayerEvent) -> Scored:
    """As many experts per token as the current event has; their weights sum to what its weights
    sum to."""
    top = logits.topk(len(event.ids[0]))
    sums = torch.tensor([sum(row) for row in event.weights], device=logits.device)
    return top.indices.tolist(), (top.values.softmax(-1) * sums.unsqueeze(-1)).tolist()


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

    def start(self, layers: Sequence[int], x: torch.Tensor) -> dict[int, torch.Tensor]:
        """Ids [1, k] for those of ``layers`` that passed, about one token."""
        passed = [layer for layer in layers if layer in self._picks]
        if not passed:
            return {}
        matrices = [self._matrices[layer] for layer in passed]
        logits = self._products(x.view(1, -1), matrices)
        parts = torch.split(logits, [len(m) for m in matrices], dim=1)
        picks = self._picks
        return {n: part.topk(picks[n]).indices for n, part in zip(passed, parts, strict=True)}

    def answers(
        self, ids: Mapping[int, Sequence[Sequence[int]]], x: torch.Tensor
    ) -> dict[int, Scored]:
        """What was started about ``x``, once it was read."""
        kept = x.clone() if ids else x  # the memory of x is used again after this event
        return {n: (found, _Weights(self._routers[n], kept)) for n, found in ids.items()}

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
