"""The expert MLP on the CPU: one call = one expert with all its tokens of one event.

Knows: tensors, the Experts module's own activation and flags. Does not know: where the weights came
from, which expert this is, who else runs.

The shape of a call never depends on residency or on the order of arrival, so neither do its bits.
Row counts are rounded up to a bucket: oneDNN compiles a kernel for every new count (0.4-0.5 ms).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from understudy import formats
from understudy.core import STORED

Pieces = Sequence[torch.Tensor]


def bucket(rows: int) -> int:
    """The row count a call is padded to: powers of two up to 64, then multiples of 64."""
    if rows <= 64:
        return 1 << (rows - 1).bit_length()
    return -(-rows // 64) * 64


class ExpertMlp:
    """What one expert of one Experts module computes, given its weights.

    ``module`` is the module of transformers (its parameters are gone, its activation and flags are
    not). Mirrors `transformers.integrations.moe`: up or gate_up, activation, down, optional norm.
    ``format``: of the weights; matrices in a quantised one are unpacked once per call.
    """

    def __init__(self, module: Any, format: str = STORED) -> None:
        self.format = None if format == STORED else formats.get(format)
        self.transposed: bool = module.is_transposed
        self.gated: bool = module.has_gate
        self.act: Callable[[torch.Tensor], torch.Tensor] | None = getattr(module, "act_fn", None)
        self.apply_gate: Callable[[torch.Tensor], torch.Tensor] = module._apply_gate
        self.norm = module.post_expert_norm if module.has_post_expert_norm else None

    def __call__(self, x: torch.Tensor, weights: Mapping[str, Pieces]) -> torch.Tensor:
        """x [n, H] -> [n, H], before the routing weight."""
        if self.gated:
            h = self.apply_gate(self._linear(x, weights, "gate_up_proj"))
        else:
            assert self.act is not None
            h = self.act(self._linear(x, weights, "up_proj"))
        out = self._linear(h, weights, "down_proj")
        return out if self.norm is None else self.norm(out)

    def _linear(self, x: torch.Tensor, weights: Mapping[str, Pieces], name: str) -> torch.Tensor:
        parts = [F.linear(x, matrix) for matrix in self._matrices(weights, name, x.dtype)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        bias = weights.get(f"{name}_bias")
        if bias is None:
            return out
        return out + torch.cat([b.to(x.dtype) for b in bias], dim=-1)

    def _matrices(
        self, weights: Mapping[str, Pieces], name: str, dtype: torch.dtype
    ) -> Iterator[torch.Tensor]:
        """The pieces of a parameter, each [out, in] in the dtype of the computation."""
        scales = weights.get(f"{name}_scales")
        if self.format is None or scales is None:
            yield from (self._matrix(piece, dtype) for piece in weights[name])
            return
        for codes, its in zip(weights[name], scales, strict=True):
            yield self.format.unpack(codes, its, dtype)

    def _matrix(self, piece: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """[out, in] in the dtype of the computation; slots hold what is stored."""
        matrix = piece.T if self.transposed else piece
        return matrix if matrix.dtype == dtype else matrix.to(dtype)


class Batch:
    """The tokens of one event, sorted by expert, and the outputs per (token, rank).

    x [T, H], ids [T, k], weights [T, k]. Outputs are summed over ranks in rank order, whatever the
    order in which experts were computed.
    """

    def __init__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
        self.x, self.weights = x, weights
        self.tokens, self.k = ids.shape
        self.out = torch.empty(self.tokens * self.k, x.shape[1], dtype=x.dtype)
        flat = ids.reshape(-1)
        if self.tokens == 1:
            self._single = {int(e): rank for rank, e in enumerate(flat.tolist())}
        else:
            order = torch.argsort(flat, stable=True)
            found, counts = torch.unique_consecutive(flat[order], return_counts=True)
            parts = torch.split(order, counts.tolist())
            self._places = dict(zip(found.tolist(), parts, strict=True))

    def compute(self, expert: int, mlp: ExpertMlp, weights: Mapping[str, Pieces]) -> None:
        """Run one expert on its tokens and keep the result."""
        if self.tokens == 1:
            self.out[self._single[expert]] = mlp(self.x, weights)[0]
            return
        places = self._places[expert]
        n = len(places)
        rows = self.x.new_zeros(bucket(n), self.x.shape[1])
        torch.index_select(self.x, 0, places // self.k, out=rows[:n])
        self.out[places] = mlp(rows, weights)[:n]

    def skip(self, expert: int) -> int:
        """Leave ``expert`` out: it contributes nothing. Returns to how many (token, rank) pairs."""
        places = self._single[expert] if self.tokens == 1 else self._places[expert]
        self.out[places] = 0
        return 1 if isinstance(places, int) else len(places)

    def sum(self) -> torch.Tensor:
        """[T, H]: the weighted sum over ranks, rounded once."""
        out = self.out.view(self.tokens, self.k, -1) * self.weights.unsqueeze(-1)
        return out.sum(dim=1).to(self.x.dtype)
