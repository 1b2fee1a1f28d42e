"""SwiGLU experts on the device, computed straight from their slots.

Knows: shapes, grids, tiles, how the pairs of many tokens are put in blocks. Does not know: which
expert lies in a slot, how it came there, who chose the tiles (`tuning` measures them); what is
multiplied and rounded is in `kernels`, which is Triton and imported only when somebody computes.

Nothing here makes the host wait, and no size depends on what a tensor holds: all of it may be
recorded in a graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from understudy.core import STORED
from understudy.experts.device import Device
from understudy.experts.device.slab import Field, Slab

FEW = 8  # tokens: up to here `Swiglu.few`, beyond `Swiglu.many`
KINDS = {STORED: 0, "int8": 8, "int4": 4}  # formats we read -> bits of a code (stored: none)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
VECTOR = 16  # bytes that a thread loads at once
SUMMED = 512  # elements of `sum` per program
UNFUSED: dict[str, Any] = {"enable_fp_fusion": False}  # why: the head of `kernels`


# --------------------------------------------------------------------------------------- the tiles


@dataclass(frozen=True, slots=True)
class Strip:
    """What a program of few tokens does: ``rows`` pairs of rows of a matrix, ``lanes`` vectors of
    each at a time, up to ``unroll`` such chunks under way; ``together``: and those of so many
    ranks (where the program sums over ranks). ``registers``: how many a thread may take. The
    compiler starts many loads before it waits for the first only where it is told so."""

    rows: int = 4
    lanes: int = 32
    unroll: int = 4
    warps: int = 4
    registers: int = 96
    together: int = 1


@dataclass(frozen=True, slots=True)
class Block:
    """What a program of many tokens does: ``rows`` pairs of one expert times ``lines`` of a matrix,
    ``depth`` bytes of x at a time, loaded ``stages`` - 1 steps ahead."""

    rows: int = 64
    lines: int = 128
    depth: int = 128
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True, slots=True)
class Tiles:
    """One of each kernel. The defaults are a guess for data-centre GPUs, measured nowhere: enough
    bytes under way to fill an H100 with one token of eight ranks and rows of 4 KiB.

    Bits depend on tiles, so a model must keep those it began with.
    """

    hidden: Strip = Strip()
    down: Strip = Strip(rows=2, warps=2, registers=128, together=2)
    hidden_many: Block = Block()
    down_many: Block = Block()


# -------------------------------------------------------------------------------------- the shapes


@dataclass(frozen=True, slots=True)
class _Matrix:
    """One matrix [lines, inner] as the kernels see it."""

    inner: int
    unit: int  # bytes of what one lane element is: a weight, or a word of eight int4 codes
    constants: dict[str, Any]

    @classmethod
    def of(cls, slab: Slab, name: str, kind: str, numbers: Any) -> _Matrix:
        """``numbers``: `triton.language`, whose dtypes have the names of torch's."""
        codes, scales = slab.fields[name], slab.fields.get(f"{name}_scales")
        inner = _inner(codes, kind)
        constants = {
            "START": codes.start,
            "SCALES": 0 if scales is None else scales.start,
            "KIND": kind,
            "TYPE": getattr(numbers, str(codes.dtype).removeprefix("torch.")),
            "GROUP": inner // scales.shape[1] if scales and len(scales.shape) > 1 else inner,
        }
        return cls(inner, 4 if kind == "int4" else codes.dtype.itemsize, constants)

    def strip(self, tile: Strip) -> dict[str, Any]:
        units = self.inner // 8 if self.constants["KIND"] == "int4" else self.inner
        chunk = tile.lanes * VECTOR // self.unit
        chunks = -(-units // chunk)
        passes = -(-chunks // tile.unroll)
        how = {"ROWS": tile.rows, "CHUNK": chunk, "UNROLL": -(-chunks // passes)}
        launch = {"num_warps": tile.warps, "maxnreg": tile.registers}
        return {**self.constants, **how, **UNFUSED, **launch}

    def block(self, tile: Block, x: torch.dtype) -> dict[str, Any]:
        how = {"ROWS": tile.rows, "LINES": tile.lines, "DEPTH": tile.depth // x.itemsize}
        launch = {"num_warps": tile.warps, "num_stages": tile.stages}
        return {**self.constants, **how, **UNFUSED, **launch}


def _inner(codes: Field, kind: str) -> int:
    """K, the length of a line in weights."""
    return codes.shape[1] * codes.dtype.itemsize * 8 // (KINDS[kind] or 8 * codes.dtype.itemsize)


def why_not(slab: Slab, format: str, dtype: torch.dtype) -> str | None:
    """Why `Swiglu` cannot compute experts that lie like this in ``dtype``; ``None`` where it can.
    That they are SwiGLU at all is for the caller to know."""
    if find_spec("triton") is None:
        return "triton is not installed"
    if format not in KINDS:
        return f"no kernel reads {format}"
    scales = () if format == STORED else ("gate_up_proj_scales", "down_proj_scales")
    if set(slab.fields) != {"gate_up_proj", "down_proj", *scales}:
        return f"an expert is not just two matrices: {', '.join(slab.fields)}"
    matrices = [slab.fields[name] for name in ("gate_up_proj", "down_proj")]
    if any(field.axis != 0 for field in matrices):
        return "the matrices lie transposed"
    stored = {dtype} | {field.dtype for field in matrices if format == STORED}
    strange = [str(d) for d in stored if d not in DTYPES]
    return f"no kernel for {strange[0]}" if strange else None


def weight_bytes(slab: Slab, distinct: int) -> int:
    """What a call must read at least that names so many different experts."""
    return distinct * sum(field.nbytes for field in slab.fields.values())


# ------------------------------------------------------------------------------------- the experts


class Swiglu:
    """Experts of one layer in equal slots of ``arena``, uint8 [slots * slot_bytes].

    ``pairs``: (token, rank) pairs in the largest call of `few` and `pairs`; their hidden states get
    memory of their own. ``distinct``: how many different slots a call of `many` names at most; by
    default as many as there are.

    ``x`` [T, H] in ``dtype``, ``slots`` [T, k] int32, all contiguous. A slot of -1 contributes
    nothing. A token's bits depend on its own row, experts and weights, and on the tiles.
    """

    def __init__(
        self, device: Device, slab: Slab, format: str, dtype: torch.dtype, arena: torch.Tensor,
        slot_bytes: int, pairs: int, *, tiles: Tiles | None = None, distinct: int | None = None,
    ) -> None:  # fmt: skip
        from understudy.experts.device import kernels

        self.device, self.slab, self.dtype, self.arena = device, slab, dtype, arena
        self.tiles = tiles or Tiles()
        self.hidden, self.width = slab.fields["down_proj"].shape[0], 0
        self._kernels: Any = kernels
        self._gate_up = _Matrix.of(slab, "gate_up_proj", format, kernels.tl)
        self._down = _Matrix.of(slab, "down_proj", format, kernels.tl)
        self.width = self._down.inner
        self._shape = {"H": self.hidden, "I": self.width, "SLOT": slot_bytes}
        self._distinct = len(arena) // slot_bytes if distinct is None else distinct
        memory = device.allocate(pairs * self.width * dtype.itemsize)
        self._h = memory.view(dtype).view(pairs, self.width)

    def few(self, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Weighted sums over ranks [T, H], for up to `FEW` tokens. ``weights`` [T, k], any dtype:
        bit for bit `pairs`, then `sum`, of pairs that were zero before."""
        self._few_hidden(x, slots)
        tile, out = self.tiles.down, torch.empty_like(x)
        self._launch(
            self._kernels.mixed, len(x), (self.hidden, 2 * tile.rows),
            self._h, slots, self.arena, weights.contiguous(), out,
            RANKS=slots.shape[1], TOGETHER=tile.together, **self._down.strip(tile),
        )  # fmt: skip
        return out

    def pairs(self, x: torch.Tensor, slots: torch.Tensor, into: torch.Tensor) -> None:
        """The outputs of pairs whose slot is not -1, to their places in ``into`` [T, k, H]; other
        places stay as they are."""
        self._few_hidden(x, slots)
        tile = self.tiles.down
        self._launch(
            self._kernels.down, slots.numel(), (self.hidden, 2 * tile.rows),
            self._h, slots, self.arena, into, **self._down.strip(tile),
        )  # fmt: skip

    def _few_hidden(self, x: torch.Tensor, slots: torch.Tensor) -> None:
        assert x.is_contiguous() and slots.is_contiguous()
        assert slots.dtype == torch.int32 and slots.numel() <= len(self._h)
        tile = self.tiles.hidden
        self._launch(
            self._kernels.hidden, slots.numel(), (self.width, tile.rows),
            x, slots, self.arena, self._h, RANKS=slots.shape[1], **self._gate_up.strip(tile),
        )  # fmt: skip

    def sum(self, into: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``into`` [T, k, H], ``weights`` [T, k] -> [T, H]: the sum over ranks in their order, in
        fp32, rounded once."""
        tokens, ranks, _ = into.shape
        out = into.new_empty(tokens, self.hidden)
        self.device.launch(
            self._kernels.weighted, (tokens, -(-self.hidden // SUMMED)),
            into, weights.contiguous(), out, H=self.hidden, RANKS=ranks, ROWS=SUMMED, **UNFUSED,
        )  # fmt: skip
        return out

    def many(self, x: torch.Tensor, slots: torch.Tensor, into: torch.Tensor) -> None:
        """`pairs` for any number of tokens, by other kernels: the same up to rounding."""
        first, second = self.tiles.hidden_many, self.tiles.down_many
        assert first.rows == second.rows and x.is_contiguous() and into.is_contiguous()
        sorted_slots, order = torch.sort(slots.reshape(-1), stable=True)
        blocks = _blocks(sorted_slots, first.rows, self._distinct)
        h = x.new_empty(slots.numel(), self.width)
        self._launch(
            self._kernels.hidden_many, len(blocks), (self.width, first.lines // 2),
            x, sorted_slots, order, blocks, self.arena, h, len(order),
            RANKS=slots.shape[1], **self._gate_up.block(first, self.dtype),
        )  # fmt: skip
        self._launch(
            self._kernels.down_many, len(blocks), (self.hidden, second.lines),
            h, sorted_slots, order, blocks, self.arena, into, len(order),
            **self._down.block(second, self.dtype),
        )  # fmt: skip

    def _launch(
        self, kernel: Any, across: int, down: tuple[int, int], *args: Any, **options: Any
    ) -> None:
        """``across`` programs for each of the pieces of a matrix: so many lines, so many each."""
        lines, each = down
        self.device.launch(kernel, (across, -(-lines // each)), *args, **self._shape, **options)


def _blocks(slots: torch.Tensor, rows: int, distinct: int) -> torch.Tensor:
    """Where the blocks of up to ``rows`` pairs of one slot begin in sorted ``slots`` [n], -1 left
    out; n where there is none. As many as there could be, whatever ``slots`` holds."""
    n = len(slots)
    most = min(n, n // rows + min(n, distinct))
    at = torch.arange(n, device=slots.device)
    new = torch.ones(n, dtype=torch.bool, device=slots.device)
    new[1:] = slots[1:] != slots[:-1]
    run = torch.where(new, at, 0).cummax(0).values  # where the run of equal slots began
    begins = ((at - run) % rows == 0) & (slots >= 0)
    number = torch.where(begins, begins.cumsum(0) - 1, most)  # all others share a place behind
    found = torch.full((most + 1,), n, device=slots.device)
    return found.scatter_(0, number, torch.where(begins, at, n))[:most]
