"""int8: one signed byte per weight, one fp32 scale per output row (lossy).

Knows: symmetric rounding to -127..127. Does not know: groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from understudy.formats import Packed, in_fp32, packed, wide_enough

LARGEST = 127


@dataclass(frozen=True, slots=True)
class Int8:
    """codes int8 [out, in], scales fp32 [out]; weight = code * scale, scale = max |row| / 127."""

    name: str = "int8"
    exact: bool = False
    bits: int = 8

    def pack(self, matrix: torch.Tensor) -> Packed:
        wide = in_fp32(matrix, self.name)
        scales = wide.abs().amax(dim=1) / LARGEST
        divisor = torch.where(scales > 0, scales, 1)
        codes = (wide / divisor[:, None]).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
        return packed(codes, scales)

    def unpack(
        self, codes: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        assert scales is not None
        return (codes.to(wide_enough(dtype)) * scales[:, None]).to(dtype)

    def nbytes(self, out: int, inner: int) -> int:
        return out * inner + 4 * out


INT8 = Int8()
