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
    """One tile of each kernel. The defaults are a guess, measured nowhere: enough bytes under way
    for an H100 and one token of eight experts with rows of 4 KiB, and no register spilled.

    Bits depend on tiles: who wants the same again takes the same.
    """

    hidden: Strip = Strip()
    down: Strip = Strip(rows=2, warps=2, registers=128, together=2)
    many: Block = Block()

    @classmethod
    def usual(cls, dtype: torch.dtype) -> Tiles:
        """fp32 is multiplied without tensor cores, whose operands fill more registers."""
        if dtype == torch.float32:
            return cls(many=Block(rows=32, lines=64, depth=64))
        return cls()


# -------------------------------------------------------------------------------------- the shapes


def _inner(codes: Field, kind: str) -> int:
    """The length of a line in weights."""
    return codes.shape[1] * codes.dtype.itemsize * 8 // (KINDS[kind] or 8 * codes.dtype.itemsize)


def _matrix(slab: Slab, name: str, kind: str) -> Any:
    """A `kernels.Matrix`."""
    from triton import language  # whose dtypes have the names of torch's

    from understudy.experts.device import kernels

    codes, scales = slab.fields[name], slab.fields.get(f"{name}_scales")
    inner = _inner(codes, kind)
    group = inner // scales.shape[1] if scales and len(scales.shape) > 1 else inner
    stored = getattr(language, str(codes.dtype).removeprefix("torch."))
    start = 0 if scales is None else scales.start
    return kernels.Matrix(kind, stored, inner, codes.start, start, group)


def _rows(matrix: Any, tile: Strip) -> dict[str, Any]:
    """The launch of a kernel for few tokens."""
    from understudy.experts.device import kernels

    codes_in_word = 8 if matrix.kind == "int4" else 1
    nbytes = 4 if matrix.kind == "int4" else matrix.stored.primitive_bitwidth // 8
    chunk = tile.lanes * VECTOR // nbytes
    chunks = -(-matrix.inner // (codes_in_word * chunk))
    turns = -(-chunks // tile.unroll)
    rows = kernels.Rows(tile.rows, chunk, -(-chunks // turns))
    launch = {"num_warps": tile.warps, "maxnreg": tile.registers}
    return {"M": matrix, "T": rows, **launch, **UNFUSED}


def _lines(matrix: Any, tile: Block, dtype: torch.dtype) -> dict[str, Any]:
    """The launch of a kernel for many tokens."""
    from understudy.experts.device import kernels

    lines = kernels.Lines(tile.rows, tile.lines, tile.depth // dtype.itemsize)
    launch = {"num_warps": tile.warps, "num_stages": tile.stages}
    return {"M": matrix, "T": lines, **launch, **UNFUSED}


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
        self.tiles = tiles = tiles or Tiles.usual(dtype)
        self._kernels: Any = kernels
        gate_up, down = _matrix(slab, "gate_up_proj", format), _matrix(slab, "down_proj", format)
        self._few = _rows(gate_up, tiles.hidden), _rows(down, tiles.down)
        self._many = _lines(gate_up, tiles.many, dtype), _lines(down, tiles.many, dtype)
        self.hidden, self.width = gate_up.inner, down.inner
        self._shape = {"HIDDEN": self.hidden, "WIDTH": self.width, "SLOT": slot_bytes}
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
            RANKS=slots.shape[1], TOGETHER=tile.together, **self._few[1],
        )  # fmt: skip
        return out

    def pairs(self, x: torch.Tensor, slots: torch.Tensor, into: torch.Tensor) -> None:
        """The outputs of pairs whose slot is not -1, to their places in ``into`` [T, k, H]; other
        places stay as they are."""
        assert into.is_contiguous()
        self._few_hidden(x, slots)
        self._launch(
            self._kernels.down, slots.numel(), (self.hidden, 2 * self.tiles.down.rows),
            self._h, slots, self.arena, into, **self._few[1],
        )  # fmt: skip

    def _few_hidden(self, x: torch.Tensor, slots: torch.Tensor) -> None:
        assert x.is_contiguous() and slots.is_contiguous()
        assert slots.dtype == torch.int32 and slots.numel() <= len(self._h)
        self._launch(
            self._kernels.hidden, slots.numel(), (self.width, self.tiles.hidden.rows),
            x, slots, self.arena, self._h, RANKS=slots.shape[1], **self._few[0],
        )  # fmt: skip

    def sum(self, into: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``into`` [T, k, H], ``weights`` [T, k] -> [T, H]: the sum over ranks in their order, in
        fp32, rounded once."""
        tokens, ranks, _ = into.shape
        out = into.new_empty(tokens, self.hidden)
        self.device.launch(
            self._kernels.weighted, (tokens, -(-self.hidden // SUMMED)),
            into, weights.contiguous(), out,
            HIDDEN=self.hidden, RANKS=ranks, ROWS=SUMMED, **UNFUSED,
        )  # fmt: skip
        return out

    def many(self, x: torch.Tensor, slots: torch.Tensor, into: torch.Tensor) -> None:
        """`pairs` for any number of tokens, by other kernels: the same up to rounding."""
        assert x.is_contiguous() and into.is_contiguous()
        tile = self.tiles.many
        sorted_slots, order = torch.sort(slots.reshape(-1), stable=True)
        blocks = _blocks(sorted_slots, tile.rows, self._distinct)
        where = (sorted_slots, order, blocks, self.arena)
        h = x.new_empty(slots.numel(), self.width)
        self._launch(
            self._kernels.hidden_many, len(blocks), (self.width, tile.lines // 2),
            x, *where, h, len(order), RANKS=slots.shape[1], **self._many[0],
        )  # fmt: skip
        self._launch(
            self._kernels.down_many, len(blocks), (self.hidden, tile.lines),
            h, *where, into, len(order), **self._many[1],
        )  # fmt: skip

    def _launch(
        self, kernel: Any, across: int, cut: tuple[int, int], *args: Any, **options: Any
    ) -> None:
        """``across`` programs for each piece of a matrix. ``cut``: its lines, and how many make a
        piece."""
        lines, each = cut
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
