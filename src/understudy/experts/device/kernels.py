"""The expert MLP in Triton, reading weights where they lie in the slots of the device.

Knows: addresses, how weights are encoded, what is rounded and in which order numbers are added.
Does not know: torch, which expert lies in a slot, who chose the tiles.

A *pair* is one (token, rank), one expert applied to one token: ``pair = token * RANKS + rank``.
`hidden`, `down` and `mixed` are for few tokens: dot products of single pairs; each thread loads the
weights it multiplies straight into its registers. `hidden_many` and `down_many` are for many:
matrix products of blocks of pairs that share an expert.

Rounded to the dtype of x, as on torch's way through an expert: gate, up, silu(gate), its product
with up, the output of each pair, and the weighted sum, once. All else is fp32. A stored weight
wider than x is rounded to its dtype; codes of int8 and int4 are multiplied as the whole numbers
they are and sums of products scaled, so no such weight is rounded.

Bits do not depend on company: how a row of weights is added up is a matter of the shape and the
tile alone. Launched with ``enable_fp_fusion=False``, an addition is fused with a multiplication
exactly where `tl.fma` says so; kernels that share a function then share its bits.

Shapes are constants of a kernel (a model has one or two): loads are as wide as alignment allows,
and divisions cost nothing. HIDDEN is the length of x, WIDTH that of what is between the matrices,
SLOT the bytes from slot to slot.
"""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Matrix(NamedTuple):
    """A matrix [lines, inner] inside a slab. ``kind``: "stored", "int8" or "int4"; ``stored``: the
    Triton dtype of its codes; ``start`` and ``scales``: bytes into the slab; ``group``: weights
    that share a scale (int4)."""

    kind: str
    stored: Any
    inner: int
    start: int
    scales: int
    group: int


class Rows(NamedTuple):
    """What a program of few tokens does: ``rows`` pairs of rows of a matrix, ``chunk`` elements of
    each at a time (int4: words of eight codes), ``unroll`` of these in one turn of the loop."""

    rows: int
    chunk: int
    unroll: int


class Lines(NamedTuple):
    """What a program of many tokens does: ``rows`` pairs times ``lines`` of a matrix, ``depth``
    elements of x at a time (int4: a group)."""

    rows: int
    lines: int
    depth: int


# ------------------------------------------------------------------------------------ small numbers


@triton.jit
def _rounded(number, D: tl.constexpr):
    """Numbers as D holds them, in fp32."""
    return number.to(D).to(tl.float32)


@triton.jit
def _gated(gate, up, D: tl.constexpr):
    """silu(gate) * up of sums in fp32, in D."""
    gate = _rounded(gate, D)
    return (_rounded(gate / (1 + tl.exp(-gate)), D) * _rounded(up, D)).to(D)


@triton.jit
def _factor(stored, KIND: tl.constexpr, D: tl.constexpr):
    """What lies in memory, as a factor in fp32.

    A byte becomes a number by way of the mantissa of 2^23: the unit that converts integers is
    slower than the memory. With its sign flipped, 0..255 stands for -128..127.
    """
    if KIND == "int8":
        placed = stored.to(tl.uint8, bitcast=True).to(tl.int32) ^ 0x4B000080
        return placed.to(tl.float32, bitcast=True) - 8388736.0
    return _rounded(stored, D)


@triton.jit
def _nibble(words, PLACE: tl.constexpr):
    """Nibble number PLACE of each word, 0..15, as -8..7 in fp32: left where it is in the mantissa
    of 2^23, scaled down, and what is too much taken off (both exact)."""
    SHIFT: tl.constexpr = 4 * (PLACE % 5)
    UNIT: tl.constexpr = 0.5**SHIFT
    if PLACE >= 5:  # beyond the mantissa
        words = words >> 20
    placed = (words & (15 << SHIFT)) | 0x4B000000
    return tl.fma(placed.to(tl.float32, bitcast=True), UNIT, -(8388608.0 * UNIT + 8.0))


# -------------------------------------------------------------------------------------- few tokens
#
# Two rows of weights at a time (gate and up, or two of down) share what is loaded of x. Rows follow
# the first axis of a tile, and with them threads and their vectors. Where the first of two rows is
# -1 nothing is loaded, and both sums are zero. A loop takes whole turns only: what is beyond the
# end is masked, which costs less than a second loop for it.


@triton.jit
def _two_rows(matrix, x, first, second, M: tl.constexpr, T: tl.constexpr):
    """Rows ``first`` and ``second`` [1, rows] of ``matrix`` times x [inner]: two of [rows]."""
    D: tl.constexpr = x.dtype.element_ty
    KIND: tl.constexpr = M.kind
    K: tl.constexpr = M.inner
    CHUNK: tl.constexpr = T.chunk
    ROWS: tl.constexpr = T.rows
    STEP: tl.constexpr = CHUNK * T.unroll
    a = tl.zeros([CHUNK, ROWS], tl.float32)
    b = tl.zeros([CHUNK, ROWS], tl.float32)
    for start in tl.range(0, (K + STEP - 1) // STEP * STEP, CHUNK, loop_unroll_factor=T.unroll):
        k = start + tl.arange(0, CHUNK)[:, None]
        inside = (k < K) & (first >= 0)
        # x in the shape of the weights: each thread loads what it multiplies, none has to wait for
        # another. It comes from the first cache.
        v = tl.load(x + (k + tl.zeros_like(first)), mask=inside, other=0).to(tl.float32)
        one = tl.load(matrix + (first * K + k), mask=inside, other=0)
        two = tl.load(matrix + (second * K + k), mask=inside, other=0)
        a = tl.fma(_factor(one, KIND, D), v, a)
        b = tl.fma(_factor(two, KIND, D), v, b)
    return tl.sum(a, 0), tl.sum(b, 0)


@triton.jit
def _neighbours(x, word, inside, HALF: tl.constexpr):
    """The four of x that the low (HALF 0) or the high (1) nibbles of a word of int4 codes multiply.
    Where they are 64 bits together they are loaded as such: one by one, loads would be narrow."""
    D: tl.constexpr = x.dtype.element_ty
    at = word // 4 * 8 + word % 4 + 4 * HALF  # in fours
    if D.primitive_bitwidth == 16:
        four = tl.load(x.to(tl.pointer_type(tl.int64)) + at, mask=inside, other=0)
        p = four.to(tl.int16).to(D, bitcast=True)
        q = (four >> 16).to(tl.int16).to(D, bitcast=True)
        r = (four >> 32).to(tl.int16).to(D, bitcast=True)
        s = (four >> 48).to(tl.int16).to(D, bitcast=True)
    else:
        p = tl.load(x + 4 * at, mask=inside, other=0)
        q = tl.load(x + (4 * at + 1), mask=inside, other=0)
        r = tl.load(x + (4 * at + 2), mask=inside, other=0)
        s = tl.load(x + (4 * at + 3), mask=inside, other=0)
    return p.to(tl.float32), q.to(tl.float32), r.to(tl.float32), s.to(tl.float32)


@triton.jit
def _words_times(words, low, high):
    """The eight products of each word of int4 codes, added up."""
    total = _nibble(words, 0) * low[0]
    for i in tl.static_range(1, 4):
        total = tl.fma(_nibble(words, 2 * i), low[i], total)
    for i in tl.static_range(4):
        total = tl.fma(_nibble(words, 2 * i + 1), high[i], total)
    return total


@triton.jit
def _two_rows_int4(words, scales, x, first, second, M: tl.constexpr, T: tl.constexpr):
    """`_two_rows` of codes that lie as `formats.int4` says, a thread's vector in one group."""
    K: tl.constexpr = M.inner // 8
    GROUPS: tl.constexpr = M.inner // M.group
    CHUNK: tl.constexpr = T.chunk
    ROWS: tl.constexpr = T.rows
    STEP: tl.constexpr = CHUNK * T.unroll
    a = tl.zeros([CHUNK, ROWS], tl.float32)
    b = tl.zeros([CHUNK, ROWS], tl.float32)
    for start in tl.range(0, (K + STEP - 1) // STEP * STEP, CHUNK, loop_unroll_factor=T.unroll):
        word = start + tl.arange(0, CHUNK)[:, None]
        inside = (word < K) & (first >= 0)
        low = _neighbours(x, word + tl.zeros_like(first), inside, 0)
        high = _neighbours(x, word + tl.zeros_like(first), inside, 1)
        one = tl.load(words + (first * K + word), mask=inside, other=0)
        two = tl.load(words + (second * K + word), mask=inside, other=0)
        group = word // (M.group // 8)
        of_one = tl.load(scales + (first * GROUPS + group), mask=inside, other=0)
        of_two = tl.load(scales + (second * GROUPS + group), mask=inside, other=0)
        a = tl.fma(_words_times(one, low, high), of_one.to(tl.float32), a)
        b = tl.fma(_words_times(two, low, high), of_two.to(tl.float32), b)
    return tl.sum(a, 0), tl.sum(b, 0)


@triton.jit
def _two_dots(slab, x, first, second, M: tl.constexpr, T: tl.constexpr):
    """Rows ``first`` and ``second`` [rows] of matrix M of the expert at ``slab``, times x."""
    STORED: tl.constexpr = M.stored
    if M.kind == "int4":
        words = (slab + M.start).to(tl.pointer_type(tl.int32))
        scales = (slab + M.scales).to(tl.pointer_type(tl.float16))
        a, b = _two_rows_int4(words, scales, x, first[None, :], second[None, :], M, T)
    else:
        matrix = (slab + M.start).to(tl.pointer_type(STORED))
        a, b = _two_rows(matrix, x, first[None, :], second[None, :], M, T)
        if M.kind == "int8":
            scales = (slab + M.scales).to(tl.pointer_type(tl.float32))
            a *= tl.load(scales + first, mask=first >= 0, other=0)
            b *= tl.load(scales + second, mask=first >= 0, other=0)
    return a, b


@triton.jit
def hidden(
    x, slots, arena, h, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, SLOT: tl.constexpr,
    RANKS: tl.constexpr, M: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """h[pair] = silu(gate x) * up x, for pairs whose slot is not -1. Grid: (pairs, WIDTH / rows).

    Pairs come first, so that those with the same expert read the same rows of it at about the same
    time, and all but one find them in the cache.
    """
    pair = tl.program_id(0)
    slot = tl.load(slots + pair)
    if slot >= 0:
        at = tl.program_id(1) * T.rows + tl.arange(0, T.rows)
        row = tl.minimum(at, WIDTH - 1)
        slab = arena + slot.to(tl.int64) * SLOT
        token = x + pair // RANKS * HIDDEN
        gate, up = _two_dots(slab, token, row, row + WIDTH, M, T)
        tl.store(h + (pair * WIDTH + at), _gated(gate, up, h.dtype.element_ty), mask=at < WIDTH)


@triton.jit
def _down(
    h, slots, arena, pair, at, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, SLOT: tl.constexpr,
    M: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Rows ``at`` [rows] of the output of a pair, and the ``rows`` after them, rounded, in fp32;
    zeros where its slot is -1."""
    slot = tl.load(slots + pair)
    slab = arena + tl.maximum(slot, 0).to(tl.int64) * SLOT
    first = tl.where(slot >= 0, tl.minimum(at, HIDDEN - 1), -1)
    second = tl.minimum(at + T.rows, HIDDEN - 1)
    a, b = _two_dots(slab, h + pair * WIDTH, first, second, M, T)
    return _rounded(a, h.dtype.element_ty), _rounded(b, h.dtype.element_ty)


@triton.jit
def _store_two(out, at, a, b, HIDDEN: tl.constexpr, T: tl.constexpr):
    D: tl.constexpr = out.dtype.element_ty
    tl.store(out + at, a.to(D), mask=at < HIDDEN)
    tl.store(out + (at + T.rows), b.to(D), mask=at + T.rows < HIDDEN)


@triton.jit
def down(
    h, slots, arena, into, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, SLOT: tl.constexpr,
    M: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """into[pair] = down h[pair], for pairs whose slot is not -1. Grid: (pairs, HIDDEN / 2 rows)."""
    pair = tl.program_id(0)
    if tl.load(slots + pair) >= 0:
        at = tl.program_id(1) * (2 * T.rows) + tl.arange(0, T.rows)
        a, b = _down(h, slots, arena, pair, at, HIDDEN, WIDTH, SLOT, M, T)
        _store_two(into + pair * HIDDEN, at, a, b, HIDDEN, T)


@triton.jit
def mixed(
    h, slots, arena, weights, out, HIDDEN: tl.constexpr, WIDTH: tl.constexpr, SLOT: tl.constexpr,
    RANKS: tl.constexpr, M: tl.constexpr, T: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """out[token] = sum over ranks, in their order, of weight * (down h[pair]): what `down`, then
    `weighted` make of pairs that are zero where their slot is -1. TOGETHER: ranks in one turn of
    the loop, whose weights are under way at the same time. Grid: (tokens, HIDDEN / 2 rows)."""
    token = tl.program_id(0)
    at = tl.program_id(1) * (2 * T.rows) + tl.arange(0, T.rows)
    first = tl.zeros(at.shape, tl.float32)
    second = tl.zeros(at.shape, tl.float32)
    for rank in tl.range(0, RANKS, loop_unroll_factor=TOGETHER):
        pair = token * RANKS + rank
        weight = tl.load(weights + pair).to(tl.float32)
        a, b = _down(h, slots, arena, pair, at, HIDDEN, WIDTH, SLOT, M, T)
        first = tl.fma(a, weight + tl.zeros_like(a), first)
        second = tl.fma(b, weight + tl.zeros_like(b), second)
    _store_two(out + token * HIDDEN, at, first, second, HIDDEN, T)


@triton.jit
def weighted(
    into, weights, out, HIDDEN: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """out[token] = sum over ranks, in their order, of weight * into[pair], rounded once.
    Grid: (tokens, HIDDEN / ROWS)."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.float32)
    for rank in tl.range(0, RANKS):
        pair = token * RANKS + rank
        weight = tl.load(weights + pair).to(tl.float32)
        y = tl.load(into + (pair * HIDDEN + at), mask=at < HIDDEN, other=0).to(tl.float32)
        total = tl.fma(y, weight + tl.zeros_like(y), total)
    tl.store(out + (token * HIDDEN + at), total.to(out.dtype.element_ty), mask=at < HIDDEN)


# ------------------------------------------------------------------------------------- many tokens
#
# Pairs sorted by slot: ``slots`` [pairs] as sorted, ``order`` [pairs] says where each comes from,
# ``blocks`` where blocks of up to T.rows pairs of one slot begin (``pairs``: no block). A row of a
# matrix product does not depend on the other rows, so neither does a pair on its block.


@triton.jit
def _block(slots, order, first, pairs, T: tl.constexpr):
    """Of the block that begins at ``first``: slot, pairs [rows], which of these there are."""
    at = first + tl.arange(0, T.rows)
    slot = tl.load(slots + first)
    live = tl.load(slots + at, mask=at < pairs, other=-1) == slot
    return slot.to(tl.int64), tl.load(order + at, mask=live, other=0).to(tl.int64), live


@triton.jit
def _product(matrix, x, row, live, line, M: tl.constexpr, T: tl.constexpr):
    """x[row] times lines of ``matrix``: [rows, lines] in fp32."""
    D: tl.constexpr = x.dtype.element_ty
    K: tl.constexpr = M.inner
    total = tl.zeros([row.shape[0], line.shape[0]], tl.float32)
    for start in tl.range(0, K, T.depth):
        k = (start + tl.arange(0, T.depth))[None, :]
        v = tl.load(x + (row[:, None] * K + k), mask=live[:, None] & (k < K), other=0)
        w = tl.load(matrix + (line[:, None] * K + k), mask=k < K, other=0)
        total = tl.dot(v, tl.trans(w.to(D)), total, input_precision="ieee")
    return total


@triton.jit
def _product_int4(codes, scales, x, row, live, line, M: tl.constexpr, T: tl.constexpr):
    """`_product` of codes that lie as `formats.int4` says, a group at a time: its low and its high
    nibbles each meet what they multiply in x."""
    D: tl.constexpr = x.dtype.element_ty
    K: tl.constexpr = M.inner
    GROUPS: tl.constexpr = M.inner // M.group
    total = tl.zeros([row.shape[0], line.shape[0]], tl.float32)
    byte = tl.arange(0, M.group // 2)
    for group in tl.range(0, GROUPS):
        k = group * M.group + byte // 16 * 32 + byte % 16
        at = x + (row[:, None] * K + k[None, :])
        low = tl.load(at, mask=live[:, None], other=0)
        high = tl.load(at + 16, mask=live[:, None], other=0)
        here = line[:, None] * (K // 2) + (group * (M.group // 2) + byte)[None, :]
        both = tl.load(codes + here)
        low_codes = ((both & 15).to(tl.int8) - 8).to(D)
        high_codes = ((both >> 4).to(tl.int8) - 8).to(D)
        part = tl.dot(low, tl.trans(low_codes), input_precision="ieee")
        part = tl.dot(high, tl.trans(high_codes), part, input_precision="ieee")
        scale = tl.load(scales + (line * GROUPS + group)).to(tl.float32)
        total += part * scale[None, :]
    return total


@triton.jit
def _product_of_slab(slab, x, row, live, line, M: tl.constexpr, T: tl.constexpr):
    """x[row] times lines of matrix M of the expert at ``slab``: [rows, lines] in fp32."""
    STORED: tl.constexpr = M.stored
    if M.kind == "int4":
        scales = (slab + M.scales).to(tl.pointer_type(tl.float16))
        total = _product_int4(slab + M.start, scales, x, row, live, line, M, T)
    else:
        matrix = (slab + M.start).to(tl.pointer_type(STORED))
        total = _product(matrix, x, row, live, line, M, T)
        if M.kind == "int8":
            scales = (slab + M.scales).to(tl.pointer_type(tl.float32))
            total *= tl.load(scales + line)[None, :]
    return total


@triton.jit(do_not_specialize=["pairs"])
def hidden_many(
    x, slots, order, blocks, arena, h, pairs, HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
    SLOT: tl.constexpr, RANKS: tl.constexpr, M: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """`hidden` for blocks of pairs. Grid: (blocks, WIDTH / half the lines): blocks of one expert
    meet its weights in the cache. Lines of gate and up take turns, so that factors are neighbours.
    """
    first = tl.load(blocks + tl.program_id(0))
    if first < pairs:
        slot, pair, live = _block(slots, order, first, pairs, T)
        HALF: tl.constexpr = T.lines // 2
        start = tl.program_id(1) * HALF
        both = tl.arange(0, T.lines)
        line = tl.minimum(start + both // 2, WIDTH - 1) + both % 2 * WIDTH
        total = _product_of_slab(arena + slot * SLOT, x, pair // RANKS, live, line, M, T)
        gate, up = tl.split(tl.reshape(total, [pair.shape[0], HALF, 2]))
        at = (start + tl.arange(0, HALF))[None, :]
        here = h + (pair[:, None] * WIDTH + at)
        tl.store(here, _gated(gate, up, h.dtype.element_ty), mask=live[:, None] & (at < WIDTH))


@triton.jit(do_not_specialize=["pairs"])
def down_many(
    h, slots, order, blocks, arena, into, pairs, HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
    SLOT: tl.constexpr, M: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """`down` for blocks of pairs. Grid: (blocks, HIDDEN / lines)."""
    first = tl.load(blocks + tl.program_id(0))
    if first < pairs:
        slot, pair, live = _block(slots, order, first, pairs, T)
        at = tl.program_id(1) * T.lines + tl.arange(0, T.lines)
        line = tl.minimum(at, HIDDEN - 1)
        total = _product_of_slab(arena + slot * SLOT, h, pair, live, line, M, T)
        here = into + (pair[:, None] * HIDDEN + at[None, :])
        mask = live[:, None] & (at < HIDDEN)[None, :]
        tl.store(here, total.to(into.dtype.element_ty), mask=mask)
