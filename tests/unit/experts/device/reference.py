"""SwiGLU experts in an arena, and what torch makes of them, one pair at a time.

For kernels on any device; says nothing about how they are run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from understudy import formats
from understudy.core import STORED, ByteRange, ExpertLayout, Piece
from understudy.experts.device.slab import Slab
from understudy.experts.device.swiglu import Swiglu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# format, dtype of x, dtype of the checkpoint
WAYS = [
    (STORED, BF16, BF16), (STORED, FP16, FP16), (STORED, FP32, FP32), (STORED, FP32, BF16),
    (STORED, BF16, FP32), ("int8", BF16, BF16), ("int8", FP32, BF16), ("int4", BF16, BF16),
    ("int4", FP16, BF16), ("int4", FP32, BF16),
]  # fmt: skip


class Here:
    """As much of a device as kernels need: they run where they are launched."""

    index, name, torch_device = 0, "here", torch.device("cpu")

    def launch(self, kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
        kernel[tuple(grid)](*args, **options)

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.full((nbytes,), 255, dtype=torch.uint8)  # NaN, whatever the dtype


class Experts:
    """A few random experts, NaN in the gaps between them."""

    def __init__(
        self, hidden: int, width: int, format: str = STORED, dtype: torch.dtype = BF16,
        stored: torch.dtype = BF16, *, count: int = 5, device: Any = None, **how: Any,
    ) -> None:  # fmt: skip
        torch.manual_seed(hidden + width)
        self.hidden, self.format, self.dtype = hidden, format, dtype
        self.device = device or Here()
        self.matrices = [
            {
                "gate_up_proj": (torch.randn(2 * width, hidden) / hidden**0.5).to(stored),
                "down_proj": (torch.randn(hidden, width) / width**0.5).to(stored),
            }
            for _ in range(count)
        ]
        packed = [self._packed(matrices) for matrices in self.matrices]
        self.slab = Slab.of(layout_of(packed[0], format), transposed=False)
        self.slot_bytes = self.slab.nbytes + 256
        arena = torch.full((count, self.slot_bytes), 255, dtype=torch.uint8)
        for slot, weights in zip(arena, packed, strict=True):
            self.slab.pack({name: (whole,) for name, whole in weights.items()}, slot)
        self.arena = arena.view(-1).to(self.device.torch_device)
        self.kernel = self.swiglu(**how)

    def swiglu(self, **how: Any) -> Swiglu:
        return Swiglu(
            self.device, self.slab, self.format, self.dtype, self.arena, self.slot_bytes, 64, **how
        )

    def _packed(self, matrices: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if self.format == STORED:
            return matrices
        packer = formats.get(self.format)
        return {n + part: t for n, m in matrices.items() for part, t in packer.pack(m).items()}

    def numbers(self, expert: int, name: str) -> torch.Tensor:
        """The matrix in fp32: as its format holds it, or at most as wide as x."""
        matrix = self.matrices[expert][name]
        if self.format == STORED:
            return matrix.to(self.dtype).float()
        packer = formats.get(self.format)
        return packer.unpack(*packer.pack(matrix).values(), FP32)

    def pair(self, x: torch.Tensor, expert: int) -> torch.Tensor:
        """One token through one expert: products in fp32, rounded where torch rounds."""
        both = F.linear(x.float(), self.numbers(expert, "gate_up_proj")).to(self.dtype)
        gate, up = both.chunk(2)
        h = F.silu(gate) * up
        return F.linear(h.float(), self.numbers(expert, "down_proj")).to(self.dtype)

    def pairs(self, x: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """[T, k, H]; zeros where the slot is -1."""
        out = torch.zeros(*slots.shape, self.hidden, dtype=self.dtype)
        for token, row in enumerate(slots.tolist()):
            for rank, slot in enumerate(row):
                if slot >= 0:
                    out[token, rank] = self.pair(x[token], slot)
        return out

    def event(self, tokens: int, ranks: int, seed: int = 0) -> tuple[torch.Tensor, ...]:
        """x, slots and weights; experts appear twice in a row and not at all, as chance has it."""
        dice = torch.Generator().manual_seed(100 * tokens + seed)
        x = torch.randn(tokens, self.hidden, generator=dice).to(self.dtype)
        slots = torch.randint(-1, len(self.matrices), (tokens, ranks), generator=dice).int()
        return x, slots, torch.rand(tokens, ranks, generator=dice)


def summed(outs: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """[T, k, H], [T, k] -> [T, H]."""
    return (outs.double() * weights.double()[:, :, None]).sum(1).to(outs.dtype)


def layout_of(weights: dict[str, torch.Tensor], format: str) -> ExpertLayout:
    pieces = {
        n: (Piece(0, 0, str(w.dtype).removeprefix("torch."), tuple(w.shape), w.stride()),)
        for n, w in weights.items()
    }
    return ExpertLayout((ByteRange(0, 0, 1),), pieces, format)


def near(got: torch.Tensor, wanted: torch.Tensor) -> None:
    """As near as another order of summation leaves numbers of about 1: a few steps of the dtype.
    One that falls on the other side of a rounding moves what comes after it."""
    step = (4 if wanted.dtype.itemsize == 2 else 32) * torch.finfo(wanted.dtype).eps
    torch.testing.assert_close(got, wanted, rtol=step, atol=step)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit."""
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
