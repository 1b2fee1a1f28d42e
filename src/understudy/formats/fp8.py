"""FP8 in blocks, as DeepSeek-V3 and its kin store their weights: computed as stored.

Knows: one scale per block of 128 x 128 weights. Does not know: that others round activations, too;
what is computed here is what transformers computes after dequantising.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from understudy.formats import Packed, in_fp32, packed, wide_enough

BLOCK = 128
LARGEST = 448.0  # of e4m3
BIAS = 127  # of a scale that is an exponent (e8m0)


def blocks_in(length: int) -> int:
    return -(-length // BLOCK)


@dataclass(frozen=True, slots=True)
class Fp8:
    """codes float8 (e4m3) [out, in], scales [out / 128, in / 128], rounded up, in a floating-point
    dtype, or uint8 for powers of two; weight = code * scale."""

    name: str = "fp8"
    exact: bool = True
    bits: int = 8

    def pack(self, matrix: torch.Tensor) -> Packed:
        """The largest weight of a block becomes 448. Checkpoints come packed; tests make theirs."""
        wide = in_fp32(matrix, self.name).clone()
        out, inner = wide.shape
        scales = torch.zeros(blocks_in(out), blocks_in(inner))
        for i, rows in enumerate(torch.split(wide, BLOCK)):
            for j, block in enumerate(torch.split(rows, BLOCK, dim=1)):
                scales[i, j] = block.abs().max() / LARGEST
                block.div_(scales[i, j] if scales[i, j] > 0 else 1)
        return packed(wide.to(torch.float8_e4m3fn), scales)

    def unpack(
        self, codes: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        assert scales is not None
        work = wide_enough(dtype)
        if scales.dtype == torch.uint8:
            scales = torch.exp2(scales.double() - BIAS)
        numbers = codes.to(work)
        along = scales.to(work).repeat_interleave(BLOCK, dim=1)[:, : codes.shape[1]]
        for rows, row in zip(torch.split(numbers, BLOCK), along, strict=True):
            rows.mul_(row)
        return numbers.to(dtype)

    def nbytes(self, out: int, inner: int) -> int:
        return out * inner + 4 * blocks_in(out) * blocks_in(inner)


FP8 = Fp8()
