"""The expert MLP of the device, on Triton's interpreter, against one expert at a time in torch."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are imported

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from understudy import formats
from understudy.core import STORED, ByteRange, ExpertLayout, Piece
from understudy.experts.device.slab import Slab
from understudy.experts.device.swiglu import Swiglu

pytest.importorskip("triton")

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class Here:
    """As much of a device as kernels need: they run where they are launched."""

    index, name, torch_device = 0, "interpreter", torch.device("cpu")

    def launch(self, kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
        kernel[tuple(grid)](*args, **options)

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), 255, dtype=torch.uint8)  # NaN, in all dtypes


class Experts:
    """A few random experts in an arena with gaps, and what torch makes of them."""

    def __init__(
        self, hidden: int, width: int, format: str = STORED, dtype: torch.dtype = BF16,
        stored: torch.dtype = BF16, count: int = 5, pairs: int = 64, **how: Any,
    ) -> None:  # fmt: skip
        torch.manual_seed(hidden + width)
        self.format, self.dtype = format, dtype
        self.matrices = [
            {"gate_up_proj": _matrix(2 * width, hidden, stored),
             "down_proj": _matrix(hidden, width, stored)}
            for _ in range(count)
        ]  # fmt: skip
        packed = [self._packed(m) for m in self.matrices]
        self.slab = Slab.of(_layout(packed[0], format), transposed=False)
        slot_bytes = self.slab.nbytes + 256
        arena = torch.full((count * slot_bytes,), 255, dtype=torch.uint8)
        for slot, weights in zip(arena.view(count, -1), packed, strict=True):
            self.slab.pack({n: (w,) for n, w in weights.items()}, slot)
        self.kernel = Swiglu(
            Here(),
            self.slab,
            format,
            dtype,
            arena,
            slot_bytes,
            pairs,
            **how,  # type: ignore[arg-type]
        )

    def _packed(self, matrices: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.format == STORED:
            return matrices
        packer = formats.get(self.format)
        return {n + s: t for n, m in matrices.items() for s, t in packer.pack(m).items()}

    def numbers(self, expert: int, name: str) -> torch.Tensor:
        """The matrix in fp32, as the format holds it; stored ones as wide as x at most."""
        matrix = self.matrices[expert][name]
        if self.format == STORED:
            return matrix.to(self.dtype).float()
        codes = formats.get(self.format)
        return codes.unpack(*codes.pack(matrix).values(), FP32)

    def pair(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """One token through one expert: products in fp32, rounded where torch would."""
        both = F.linear(x.float(), self.numbers(expert, "gate_up_proj")).to(self.dtype)
        gate, up = both.chunk(2)
        return F.linear((F.silu(gate) * up).float(), self.numbers(expert, "down_proj")).to(x.dtype)

    def pairs(self, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(*slots.shape, x.shape[1], dtype=self.dtype)
        for t, row in enumerate(slots.tolist()):
            for r, slot in enumerate(row):
                if slot >= 0:
                    out[t, r] = self.pair(x[t], slot)
        return out

    def summed(self, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        outs = self.pairs(x, slots).float() * weights.float()[:, :, None]
        return outs.sum(1).to(self.dtype)


def _matrix(out: int, inner: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(out, inner) / inner**0.5).to(dtype)


def _layout(weights: dict[str, torch.Tensor], format: str) -> ExpertLayout:
    pieces = {
        n: (Piece(0, 0, str(w.dtype).removeprefix("torch."), tuple(w.shape), w.stride()),)
        for n, w in weights.items()
    }
    return ExpertLayout((ByteRange(0, 0, 1),), pieces, format)


def tokens(experts: Experts, count: int, ranks: int = 2) -> tuple[torch.Tensor, ...]:
    """x, slots with duplicates and absentees, weights."""
    dice = torch.Generator().manual_seed(count)
    hidden = experts.slab.fields["down_proj"].shape[0]
    x = torch.randn(count, hidden, generator=dice).to(experts.dtype)
    slots = torch.randint(-1, len(experts.matrices), (count, ranks), generator=dice)
    return x, slots.int(), torch.rand(count, ranks, generator=dice)


def near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """As near as two orders of summation are, with a rounding between and one at the end."""
    steps = {FP32: 2e-6, FP16: 4e-3, BF16: 3e-2}[wanted.dtype]
    torch.testing.assert_close(got, wanted, rtol=steps, atol=steps)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool(torch.equal(a.view(torch.uint8), b.view(torch.uint8)))


WAYS = [
    (STORED, BF16, BF16), (STORED, FP16, FP16), (STORED, FP32, FP32), (STORED, FP32, BF16),
    (STORED, BF16, FP32), ("int8", BF16, BF16), ("int8", FP32, BF16), ("int4", BF16, BF16),
    ("int4", FP16, BF16), ("int4", FP32, BF16),
]  # fmt: skip
