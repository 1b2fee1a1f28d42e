"""MXFP4, as gpt-oss checkpoints store their experts: computed as stored, nothing is lost.

Knows: the sixteen values of FP4 (e2m1) and scales that are powers of two (e8m0).
Does not know: gpt-oss. Values and bits are those of transformers' own dequantisation.

A row is cut into blocks of 32 weights, 16 bytes each: byte i holds weight 2i in its low half and
weight 2i + 1 in its high half. One byte per block is the exponent: weight = value * 2^(scale - 127)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
import torch.nn.functional as F

from understudy.formats import CannotPack, Packed, in_fp32, packed

BLOCK = 32
BIAS = 127
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*MAGNITUDES, *(-m for m in MAGNITUDES))  # bit 3 is the sign
LARGEST_EXPONENT = 2  # of a value: 6 = 1.5 * 2^2


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """codes uint8 [out, in / 2], scales uint8 [out, in / 32]."""

    name: str = "mxfp4"
    exact: bool = True
    bits: int = 4

    def pack(self, matrix: torch.Tensor) -> Packed:
        """As the MX specification rounds: the largest weight of a block sets the exponent, each
        weight goes to the nearest value. Checkpoints come packed; tests make theirs with it."""
        wide = in_fp32(matrix, self.name)
        out, inner = wide.shape
        if inner % BLOCK:
            raise CannotPack(f"mxfp4 packs blocks of {BLOCK} weights, and a row here has {inner}")
        blocks = wide.view(out, inner // BLOCK, BLOCK)
        largest = blocks.abs().amax(dim=2)
        exponents = torch.frexp(largest).exponent - 1 - LARGEST_EXPONENT
        scales = torch.where(largest > 0, exponents + BIAS, 0).clamp(0, 254)
        codes = _nearest(blocks / torch.exp2((scales - BIAS).double())[:, :, None])
        pairs = codes.view(out, inner // 2, 2)
        return packed(pairs[:, :, 0] | pairs[:, :, 1] << 4, scales.to(torch.uint8))

    def unpack(
        self, codes: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        assert scales is not None
        out, inner = codes.shape[0], 2 * codes.shape[1]
        numbers = F.embedding(codes.int(), _pairs(dtype, codes.device)).view(
            out, scales.shape[1], BLOCK
        )
        powers = _powers(codes.device).index_select(0, scales.reshape(-1).int()).view(out, -1, 1)
        return (numbers * powers).to(dtype).view(out, inner)

    def nbytes(self, out: int, inner: int) -> int:
        return out * inner // 2 + out * (inner // BLOCK)


MXFP4 = Mxfp4()


@cache
def _pairs(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Byte -> twice its two values, low half first. Twice, so that `_powers` fit into fp32."""
    values = 2 * torch.tensor(VALUES, dtype=dtype)
    byte = torch.arange(256)
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=1).to(device)


@cache
def _powers(device: torch.device) -> torch.Tensor:
    """Scale byte -> half of 2^(byte - 127), exact in fp32 for all 256 of them."""
    return torch.exp2(torch.arange(256).double() - BIAS - 1).float().to(device)


def _nearest(numbers: torch.Tensor) -> torch.Tensor:
    """The code of the nearest value; of two equally near ones that with an even code."""
    middles = torch.tensor([(a + b) / 2 for a, b in pairwise(MAGNITUDES)])
    size = numbers.abs().double().contiguous()
    below = torch.bucketize(size, middles.double())  # a middle itself counts as below ...
    above = torch.bucketize(size, middles.double(), right=True)  # ... and as above
    codes = torch.where(below % 2 == 0, below, above)
    return (codes | torch.signbit(numbers).long() << 3).to(torch.uint8)
