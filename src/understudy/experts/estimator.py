"""The small network that says what the next router will say.

Knows: its shape and how it is stored. Does not know: how it is trained (`learn`), who asks it.
Speculating Experts (arXiv 2603.19289), 6 and appendix A: one network for all layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PREFIX = "estimator."


class Estimator(nn.Module):
    """[T, H] quasi-hidden state, layer -> [T, E] logits of that layer's router.

    A down-projection to ``width``, a learned vector per layer, an MLP (SiLU, ``expansion`` times
    wider) with a skip, a norm and a head.
    """

    def __init__(self, hidden: int, experts: int, layers: int, width: int, expansion: int) -> None:
        super().__init__()
        self.down = nn.Linear(hidden, width, bias=False)
        self.layer = nn.Embedding(layers, width)
        self.up = nn.Linear(width, expansion * width)
        self.back = nn.Linear(expansion * width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, experts)

    def forward(self, x: torch.Tensor, layer: int | torch.Tensor) -> torch.Tensor:
        """``layer``: the layer whose router is guessed; one for all rows, or one per row."""
        z = self.down(x) + self.layer.weight[layer]
        z = z + self.back(nn.functional.silu(self.up(z)))
        logits: torch.Tensor = self.head(self.norm(z))
        return logits

    @classmethod
    def of(cls, profile: Any) -> Estimator:
        """The trained one out of a profile."""
        down = profile.tensor(PREFIX + "down.weight")
        layer = profile.tensor(PREFIX + "layer.weight")
        up = profile.tensor(PREFIX + "up.weight")
        head = profile.tensor(PREFIX + "head.weight")
        made = cls(down.shape[1], len(head), len(layer), len(down), len(up) // len(down))
        state = {name: profile.tensor(PREFIX + name) for name in made.state_dict()}
        made.load_state_dict(state)
        return made.eval().requires_grad_(False)

    def tensors(self) -> dict[str, torch.Tensor]:
        """As a profile stores them."""
        return {PREFIX + name: tensor for name, tensor in self.state_dict().items()}
