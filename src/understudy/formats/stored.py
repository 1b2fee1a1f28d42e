"""bf16, fp16, fp32: a number is its own code.

Knows: torch's floating-point types. Does not know: scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from understudy.formats import Packed, packed


@dataclass(frozen=True, slots=True)
class Stored:
    """Numbers as the checkpoint has them. Also what experts without a format are in."""

    name: str
    dtype: torch.dtype
    exact: bool = True

    @property
    def bits(self) -> int:
        return 8 * self.dtype.itemsize

    def pack(self, matrix: torch.Tensor) -> Packed:
        return packed(matrix.to(self.dtype))

    def unpack(
        self, codes: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        return codes.to(dtype)

    def nbytes(self, out: int, inner: int) -> int:
        return out * inner * self.dtype.itemsize


BF16 = Stored("bf16", torch.bfloat16)
FP16 = Stored("fp16", torch.float16)
FP32 = Stored("fp32", torch.float32)
