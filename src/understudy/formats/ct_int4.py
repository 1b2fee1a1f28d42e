"""ct-int4: 4-bit integers as compressed-tensors packs them ("pack-quantized"): computed as stored.

Knows: how eight weights lie in a 32-bit word. Does not know: who trained or rounded them.

Weight k of a row is half a byte of word k / 8, lowest bits first, as its value + 8. Every group of
a row (32 weights in Kimi's checkpoints) has one scale; weight = (code - 8) * scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from understudy.formats import CannotPack, Packed, in_fp32, packed, wide_enough

GROUP = 32
ZERO = 8
PER_WORD = 8


@dataclass(frozen=True, slots=True)
class CtInt4:
    """codes int32 [out, in / 8], scales of a floating-point dtype [out, in / group]."""

    name: str = "ct-int4"
    exact: bool = True
    bits: int = 4

    def pack(self, matrix: torch.Tensor) -> Packed:
        """Symmetric rounding, bf16 scales. Checkpoints come packed; tests make theirs with it."""
        wide = in_fp32(matrix, self.name)
        out, inner = wide.shape
        if inner % GROUP:
            raise CannotPack(f"ct-int4 packs groups of {GROUP} weights, and a row here has {inner}")
        groups = wide.view(out, inner // GROUP, GROUP)
        scales = (groups.abs().amax(dim=2) / 7.5).bfloat16()
        divisor = torch.where(scales > 0, scales.float(), 1)
        codes = (groups / divisor[:, :, None]).round_().clamp_(-8, 7).to(torch.int32) + ZERO
        shifts = 4 * torch.arange(PER_WORD, dtype=torch.int32)
        words = (codes.view(out, -1, PER_WORD) << shifts).sum(dim=2, dtype=torch.int32)
        return packed(words, scales)

    def unpack(
        self, codes: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        assert scales is not None
        out = codes.shape[0]
        halves = codes.contiguous().view(torch.uint8)  # little-endian: lowest bits first
        pairs = torch.stack([halves & 15, halves >> 4], dim=2).to(wide_enough(dtype))
        grouped = pairs.sub_(ZERO).view(out, scales.shape[1], -1) * scales[:, :, None]
        return grouped.view(out, -1).to(dtype)

    def nbytes(self, out: int, inner: int) -> int:
        return out * inner // 2 + 2 * out * (inner // GROUP)


CT_INT4 = CtInt4()
