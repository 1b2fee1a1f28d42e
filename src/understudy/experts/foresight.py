"""What later layers' routers are asked about: the ways of looking ahead that learn or that look at
more than the current router input.

Knows: tensors of one forward (router input s, residual stream r), norm and router modules, a
profile's vectors. Does not know: who asks, or what is done with the answer.

    router-input   s                                the plain way; `Lookahead` does it by itself
    residual       s + mean(s' - s)                 s' is the next layer's s
    drift          norm'(r)                         norm' is the next layer's, r is after attention
    quasi          norm'(r + sum_e g_e d_e)         d_e is the mean output of expert e
    shared         norm'(r + sum_e g_e d_e + shared experts' true output)
    estimator      a small network in place of the router, asked about `quasi`
    hybrid         the estimator where it measured better, else `quasi`

All but the first two need the residual stream, which compiled layers do not show.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from understudy.core import Forward, LayerEvent
from understudy.experts.estimator import Estimator


class NotForeseen(Exception):
    """This layer cannot be asked that way, because ..."""


class Vectors(Protocol):
    """What a foresight needs of a profile."""

    def tensor(self, name: str) -> torch.Tensor: ...


class Foresight:
    """``norms`` fills as layers run: MoE layer -> the norm in front of its router."""

    needs_residual = True

    def __init__(self) -> None:
        self.norms: dict[int, torch.nn.Module] = {}

    @property
    def nbytes(self) -> int:
        return 0

    def to(self, device: torch.device) -> None:
        """What was learned goes where the model is."""

    def learn_norm(self, forward: Forward, layer: int) -> None:
        if layer in forward.residuals:
            self.norms[layer] = forward.residuals[layer][0]

    def router_input(
        self, forward: Forward, layer: int, later: int, event: LayerEvent
    ) -> torch.Tensor:
        """[T, H]: what the router of ``later`` is asked about, at ``layer``."""
        return self._normed(later, self._residual(forward, layer))

    def logits(self, later: int, asked: torch.Tensor) -> torch.Tensor | None:
        """[T, E], in place of the router's own answer; ``None``: ask the router."""
        return None

    def _residual(self, forward: Forward, layer: int) -> torch.Tensor:
        if layer not in forward.residuals:
            raise NotForeseen("the residual stream is not visible in front of this router")
        found: torch.Tensor = forward.residuals[layer][1]
        return found.reshape(-1, found.shape[-1])

    def _normed(self, later: int, x: torch.Tensor) -> torch.Tensor:
        if later not in self.norms:
            raise NotForeseen("its norm has not been seen yet")
        out: torch.Tensor = self.norms[later].forward(x)
        return out


class Residual(Foresight):
    """DALI: the mean change of the router's input from layer to layer, added."""

    needs_residual = False

    def __init__(self, vectors: torch.Tensor) -> None:
        super().__init__()
        self.vectors = vectors

    @property
    def nbytes(self) -> int:
        return self.vectors.nbytes

    def to(self, device: torch.device) -> None:
        self.vectors = self.vectors.to(device)

    def router_input(
        self, forward: Forward, layer: int, later: int, event: LayerEvent
    ) -> torch.Tensor:
        x: torch.Tensor = forward.router_args[layer][0][0]
        return x + self.vectors[layer:later].sum(0).to(x.dtype)


class Quasi(Foresight):
    """Speculating Experts (arXiv 2603.19289), 3: experts' mean outputs stand for their outputs."""

    def __init__(self, vectors: torch.Tensor, shared: Sequence[Any] = ()) -> None:
        """``vectors`` [L, E, H]. ``shared``: MoE layer -> what computes its shared experts, whose
        true output is then added."""
        super().__init__()
        self.vectors, self.shared = vectors, shared

    @property
    def nbytes(self) -> int:
        return self.vectors.nbytes

    def to(self, device: torch.device) -> None:
        self.vectors = self.vectors.to(device)

    def router_input(
        self, forward: Forward, layer: int, later: int, event: LayerEvent
    ) -> torch.Tensor:
        r = self._residual(forward, layer)
        ids = torch.tensor(event.ids, device=r.device)
        weights = torch.tensor(list(event.weights), dtype=r.dtype, device=r.device)
        if len(ids) != len(r):
            raise NotForeseen("some rows are padding")
        if self.vectors.shape[-1] != r.shape[-1]:
            raise NotForeseen("its experts are narrower than the residual stream")
        # Nobody (-1) has the last expert's vector times a weight of 0.
        state = r + (weights.unsqueeze(-1) * self.vectors[layer, ids].to(r.dtype)).sum(1)
        if self.shared:
            if self.shared[layer] is None:
                raise NotForeseen("it has no shared experts")
            state = state + self.shared[layer](forward.router_args[layer][0][0]).view_as(r)
        return self._normed(later, state)


class Estimated(Quasi):
    """The small network, for all layers or for those where it measured better."""

    def __init__(self, vectors: torch.Tensor, network: Estimator, layers: Sequence[bool]) -> None:
        super().__init__(vectors)
        self.network, self.layers = network, layers

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(p.nbytes for p in self.network.parameters())

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.network.to(device)

    def logits(self, later: int, asked: torch.Tensor) -> torch.Tensor | None:
        if not self.layers[later]:
            return None
        found: torch.Tensor = self.network(asked.float(), later)
        return found


def make(name: str, profile: Vectors | None, shared: Sequence[Any]) -> Foresight | None:
    """By name; ``None`` for the plain way. ``shared``: see `Quasi`."""
    if name == "router-input":
        return None
    if name == "drift":
        return Foresight()
    assert profile is not None, "checked before"
    if name == "residual":
        return Residual(profile.tensor("residual_vectors"))
    vectors = profile.tensor("default_vectors")
    if name == "quasi":
        return Quasi(vectors)
    if name == "shared":
        return Quasi(vectors, shared)
    better = profile.tensor("estimator_better").bool().tolist()
    layers = better if name == "hybrid" else [True] * len(better)
    return Estimated(vectors, Estimator.of(profile), layers)
