"""int4: half a byte per weight, one fp16 scale per group of 64 or 32 weights of a row (lossy).

Knows: how 32 weights lie in 16 bytes, and which scale of a group hurts least.
Does not know: what the weights are for.

    weights of a block   0  1  2 ... 15 | 16 17 ... 31
    byte i               low half: weight i, high half: weight 16 + i   (so 16 bytes unfold into
                         two runs of 16 consecutive weights with one mask and one shift)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from understudy.formats import CannotPack, Packed, in_fp32, packed, wide_enough

BLOCK = 32  # weights that share 16 bytes
GROUPS = (64, 32)  # weights that share a scale: the first that divides a row
ZERO = 8  # the code of weight 0: codes 0..15 stand for -8..7
ROWS_AT_ONCE = 1 << 18  # weights searched at a time: their copies stay in the processor's cache

# A scale that leaves the outermost weight a little outside makes all others finer: which one is
# best depends on the group, so a few are tried.
TO_MINUS_8 = (1.0, 0.95, 0.9, 0.85, 0.8)  # the largest weight becomes -8: the scale has its sign
TO_7 = (1.0, 0.95, 0.9, 0.85)  # the largest becomes 7 or -7


def group_of(inner: int) -> int:
    """Weights per scale in rows of ``inner`` weights."""
    for group in GROUPS:
        if inner % group == 0:
            return group
    raise CannotPack(
        f"int4 packs rows in blocks of {BLOCK} weights, and a row here has {inner}: use int8"
    )


@dataclass(frozen=True, slots=True)
class Int4:
    """codes uint8 [out, in / 2], scales fp16 [out, in / group]; weight = (code - 8) * scale."""

    name: str = "int4"
    exact: bool = False
    bits: int = 4

    def pack(self, matrix: torch.Tensor) -> Packed:
        wide = in_fp32(matrix, self.name)
        out, inner = wide.shape
        group = group_of(inner)
        rows = max(1, ROWS_AT_ONCE // inner)
        parts = [_quantise(part.reshape(-1, group)) for part in torch.split(wide, rows)]
        codes = torch.cat([codes for codes, _ in parts]).view(out, inner // BLOCK, 2, BLOCK // 2)
        halves = codes[:, :, 0] | codes[:, :, 1] << 4
        scales = torch.cat([scales for _, scales in parts]).view(out, inner // group)
        return packed(halves.view(out, inner // 2), scales)

    def unpack(
        self, codes: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        assert scales is not None
        out, inner = codes.shape[0], 2 * codes.shape[1]
        blocks = codes.reshape(out, inner // BLOCK, 1, BLOCK // 2)
        numbers = torch.cat([blocks & 15, blocks >> 4], dim=2).to(wide_enough(dtype)) - ZERO
        grouped = numbers.view(out, scales.shape[1], -1) * scales[:, :, None]
        return grouped.view(out, inner).to(dtype)

    def nbytes(self, out: int, inner: int) -> int:
        return out * inner // 2 + 2 * out * (inner // group_of(inner))


INT4 = Int4()


def _quantise(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, group] -> codes 0..15 [n, group], and the fp16 scale of each group that gives the
    smallest sum of squared errors among the candidates (the first of equals)."""
    best = torch.full((len(groups),), torch.inf)
    chosen = torch.zeros(len(groups))
    for scales in _candidates(groups):
        error = ((_codes(groups, scales) - ZERO).mul_(scales[:, None]) - groups).square_().sum(1)
        better = error < best
        best = torch.where(better, error, best)
        chosen = torch.where(better, scales, chosen)
    return _codes(groups, chosen).to(torch.uint8), chosen.half()


def _candidates(groups: torch.Tensor) -> Iterator[torch.Tensor]:
    """Scales worth trying, as fp16 can hold them."""
    largest = groups.gather(1, groups.abs().argmax(dim=1, keepdim=True)).squeeze(1)
    for share in TO_MINUS_8:
        yield _as_fp16(largest * (share / -8))
    for share in TO_7:
        yield _as_fp16(largest.abs() * (share / 7))


def _as_fp16(scales: torch.Tensor) -> torch.Tensor:
    rounded = scales.half()
    if not bool(torch.isfinite(rounded).all()):
        raise CannotPack(
            f"int4 keeps its scales in fp16, and weights of {scales.abs().max() * 8:.3g} need a "
            "larger one: use int8"
        )
    return rounded.float()


def _codes(groups: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The nearest code of each weight, as numbers; a scale of 0 makes all of them 0's code."""
    inverse = torch.where(scales == 0, 0.0, 1 / scales)
    return (groups * inverse[:, None]).round_().add_(ZERO).clamp_(0, 15)
