"""Experts that are all there: a seam of plain torch, for tests that are about something else."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from understudy.checkpoint import ExpertsModule
from understudy.core import Forward


class Resident:
    """One random matrix per expert. Launches work and asks nothing of the host: ``capturable``
    where it is said so. ``begun``: the steps it was told of."""

    def __init__(
        self,
        modules: Sequence[ExpertsModule],
        width: int,
        *,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        capturable: bool = False,
    ) -> None:
        dice = torch.Generator().manual_seed(0)
        self.capturable = capturable
        self.begun: list[int] = []
        self.matrices = [
            (torch.randn(m.num_experts, width, width, generator=dice) / width**0.5).to(
                device, dtype
            )
            for m in modules
        ]

    def __call__(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        chosen = self.matrices[layer][ids]  # [T, k, H, H]
        out = torch.einsum("th,tkhw->tkw", hidden, chosen)
        return (out * weights.unsqueeze(-1)).sum(1).to(hidden.dtype)

    def begin(self, forward: Forward) -> None:
        self.begun.append(forward.step)

    def end(self, forward: Forward) -> None:
        pass
