"""The expert MLP in Triton, reading weights where they lie in the slots of the device.

Knows: addresses, shapes, how weights are encoded, what is rounded and in which order numbers are
added. Does not know: torch, which expert lies in a slot, who chose the tiles.

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

Shapes are constants of a kernel (a model has one or two), so that loads are as wide as alignment
allows, and divisions cost nothing. ``SLOT``: bytes from slot to slot. Of each matrix: ``START`` and
``SCALES``, bytes into the slot; ``KIND``, "stored", "int8" or "int4"; ``TYPE``, of what is stored;
``GROUP``, weights that share a scale in int4.
"""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

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
# Two rows of weights at a time (gate and up, or two of down) share what is loaded of x. K lies along
# the first axis of a tile: threads and their vectors follow it, and a row never leaves its warp.
# Where ``live`` is false nothing is loaded and the sums are zero.


@triton.jit
def _two_rows(
    matrix, x, first, second, live, K: tl.constexpr, KIND: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Rows ``first`` and ``second`` [1, ROWS] of ``matrix`` [.., K] times x [K]: two of [ROWS]."""
    D: tl.constexpr = x.dtype.element_ty
    a = tl.zeros([CHUNK, ROWS], tl.float32)
    b = tl.zeros([CHUNK, ROWS], tl.float32)
    STEP: tl.constexpr = CHUNK * UNROLL  # whole ones only: no second loop for what is left
    for start in tl.range(0, (K + STEP - 1) // STEP * STEP, CHUNK, loop_unroll_factor=UNROLL):
        k = start + tl.arange(0, CHUNK)[:, None]
        inside = (k < K) & live
        # x in the shape of the weights: each thread loads what it multiplies, none has to wait for
        # another. It comes from the first cache.
        v = tl.load(x + (k + 0 * first), mask=inside, other=0).to(tl.float32)
        one = tl.load(matrix + (first * K + k), mask=inside, other=0)
        two = tl.load(matrix + (second * K + k), mask=inside, other=0)
        a = tl.fma(_factor(one, KIND, D), v, a)
        b = tl.fma(_factor(two, KIND, D), v, b)
    return tl.sum(a, 0), tl.sum(b, 0)


@triton.jit
def _inputs_of_words(x, word, inside, HALF: tl.constexpr):
    """What the low (HALF 0) or high (1) nibbles of words [CHUNK, ROWS] of int4 codes multiply:
    four neighbours of x each. A pair of 16 bit wide ones at a time would be loads of two bytes."""
    at = word // 4 * 8 + word % 4 + 4 * HALF  # in fours
    D: tl.constexpr = x.dtype.element_ty
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
    """Eight products of each word of int4 codes, added up."""
    total = _nibble(words, 0) * low[0]
    for i in tl.static_range(1, 4):
        total = tl.fma(_nibble(words, 2 * i), low[i], total)
    for i in tl.static_range(4):
        total = tl.fma(_nibble(words, 2 * i + 1), high[i], total)
    return total


@triton.jit
def _two_rows_int4(
    words, scales, x, first, second, live, K: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """`_two_rows` of codes that lie as `formats.int4` says; CHUNK words of eight at a time."""
    a = tl.zeros([CHUNK, ROWS], tl.float32)
    b = tl.zeros([CHUNK, ROWS], tl.float32)
    STEP: tl.constexpr = CHUNK * UNROLL
    for start in tl.range(0, (K // 8 + STEP - 1) // STEP * STEP, CHUNK, loop_unroll_factor=UNROLL):
        word = start + tl.arange(0, CHUNK)[:, None]
        inside = (word < K // 8) & live
        low = _inputs_of_words(x, word + 0 * first, inside, 0)
        high = _inputs_of_words(x, word + 0 * first, inside, 1)
        one = tl.load(words + (first * (K // 8) + word), mask=inside, other=0)
        two = tl.load(words + (second * (K // 8) + word), mask=inside, other=0)
        group = word // (GROUP // 8)
        of_one = tl.load(scales + (first * (K // GROUP) + group), mask=inside, other=0)
        of_two = tl.load(scales + (second * (K // GROUP) + group), mask=inside, other=0)
        a = tl.fma(_words_times(one, low, high), of_one.to(tl.float32), a)
        b = tl.fma(_words_times(two, low, high), of_two.to(tl.float32), b)
    return tl.sum(a, 0), tl.sum(b, 0)


@triton.jit
def _two_dots(
    slab, x, first, second, live, START: tl.constexpr, SCALES: tl.constexpr, K: tl.constexpr,
    KIND: tl.constexpr, TYPE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    CHUNK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Rows ``first`` and ``second`` [ROWS] of a matrix of the expert at ``slab``, times x [K]."""
    if KIND == "int4":
        words = (slab + START).to(tl.pointer_type(tl.int32))
        scales = (slab + SCALES).to(tl.pointer_type(tl.float16))
        a, b = _two_rows_int4(
            words, scales, x, first[None, :], second[None, :], live, K, GROUP, ROWS, CHUNK, UNROLL
        )
    else:
        matrix = (slab + START).to(tl.pointer_type(TYPE))
        a, b = _two_rows(
            matrix, x, first[None, :], second[None, :], live, K, KIND, ROWS, CHUNK, UNROLL
        )
        if KIND == "int8":
            scales = (slab + SCALES).to(tl.pointer_type(tl.float32))
            a *= tl.load(scales + first, mask=live, other=0)
            b *= tl.load(scales + second, mask=live, other=0)
    return a, b


@triton.jit
def hidden(
    x, slots, arena, h, H: tl.constexpr, I: tl.constexpr, RANKS: tl.constexpr, SLOT: tl.constexpr,
    START: tl.constexpr, SCALES: tl.constexpr, KIND: tl.constexpr, TYPE: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """h[pair] = silu(gate x) * up x, for pairs whose slot is not -1. Grid: (pairs, I / ROWS).

    Pairs come first, so that those with the same expert read the same rows of it at about the same
    time, and all but one find them in the cache.
    """
    pair = tl.program_id(0)
    slot = tl.load(slots + pair)
    if slot >= 0:
        at = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
        row = tl.minimum(at, I - 1)
        gate, up = _two_dots(
            arena + slot.to(tl.int64) * SLOT, x + pair // RANKS * H, row, row + I, True,
            START, SCALES, H, KIND, TYPE, GROUP, ROWS, CHUNK, UNROLL,
        )  # fmt: skip
        tl.store(h + (pair * I + at), _gated(gate, up, h.dtype.element_ty), mask=at < I)


@triton.jit
def _down(
    h, slots, arena, pair, at, H: tl.constexpr, I: tl.constexpr, SLOT: tl.constexpr,
    START: tl.constexpr, SCALES: tl.constexpr, KIND: tl.constexpr, TYPE: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Rows ``at`` [ROWS], and the ROWS after them, of the output of a pair, rounded, in fp32; zeros
    where its slot is -1."""
    slot = tl.load(slots + pair)
    a, b = _two_dots(
        arena + tl.maximum(slot, 0).to(tl.int64) * SLOT, h + pair * I,
        tl.minimum(at, H - 1), tl.minimum(at + ROWS, H - 1), slot >= 0,
        START, SCALES, I, KIND, TYPE, GROUP, ROWS, CHUNK, UNROLL,
    )  # fmt: skip
    return _rounded(a, h.dtype.element_ty), _rounded(b, h.dtype.element_ty)


@triton.jit
def down(
    h, slots, arena, into, H: tl.constexpr, I: tl.constexpr, SLOT: tl.constexpr,
    START: tl.constexpr, SCALES: tl.constexpr, KIND: tl.constexpr, TYPE: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """into[pair] = down h[pair], for pairs whose slot is not -1. Grid: (pairs, H / (2 ROWS))."""
    pair = tl.program_id(0)
    if tl.load(slots + pair) >= 0:
        at = tl.program_id(1) * (2 * ROWS) + tl.arange(0, ROWS)
        a, b = _down(
            h, slots, arena, pair, at,
            H, I, SLOT, START, SCALES, KIND, TYPE, GROUP, ROWS, CHUNK, UNROLL,
        )  # fmt: skip
        out = into + (pair * H + at)
        tl.store(out, a.to(into.dtype.element_ty), mask=at < H)
        tl.store(out + ROWS, b.to(into.dtype.element_ty), mask=at + ROWS < H)


@triton.jit
def mixed(
    h, slots, arena, weights, out, H: tl.constexpr, I: tl.constexpr, RANKS: tl.constexpr,
    SLOT: tl.constexpr, START: tl.constexpr, SCALES: tl.constexpr, KIND: tl.constexpr,
    TYPE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    UNROLL: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """out[token] = sum over ranks of weight * (down h[pair]): what `down`, then `weighted` make of
    pairs that would be zero where their slot is -1. Grid: (tokens, H / (2 ROWS)).

    TOGETHER: ranks whose weights are under way at the same time.
    """
    token = tl.program_id(0)
    at = tl.program_id(1) * (2 * ROWS) + tl.arange(0, ROWS)
    first = tl.zeros([ROWS], tl.float32)
    second = tl.zeros([ROWS], tl.float32)
    for rank in tl.range(0, RANKS, loop_unroll_factor=TOGETHER):
        pair = token * RANKS + rank
        weight = tl.load(weights + pair).to(tl.float32)
        a, b = _down(
            h, slots, arena, pair, at,
            H, I, SLOT, START, SCALES, KIND, TYPE, GROUP, ROWS, CHUNK, UNROLL,
        )  # fmt: skip
        first = tl.fma(a, weight + 0 * a, first)
        second = tl.fma(b, weight + 0 * b, second)
    here = out + (token * H + at)
    tl.store(here, first.to(out.dtype.element_ty), mask=at < H)
    tl.store(here + ROWS, second.to(out.dtype.element_ty), mask=at + ROWS < H)


@triton.jit
def weighted(
    into, weights, out, H: tl.constexpr, RANKS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """out[token] = sum over ranks, in their order, of weight * into[pair], rounded once.
    Grid: (tokens, H / ROWS)."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros([ROWS], tl.float32)
    for rank in tl.range(0, RANKS):
        pair = token * RANKS + rank
        weight = tl.load(weights + pair).to(tl.float32)
        y = tl.load(into + (pair * H + at), mask=at < H, other=0).to(tl.float32)
        total = tl.fma(y, weight, total)
    tl.store(out + (token * H + at), total.to(out.dtype.element_ty), mask=at < H)


# ------------------------------------------------------------------------------------- many tokens
#
# Pairs sorted by slot: ``slots`` [pairs] as sorted, ``order`` [pairs] says where each comes from,
# ``blocks`` where blocks of up to ROWS pairs of one slot begin (``pairs``: no block). A row of a
# matrix product does not depend on the other rows, so neither does a pair on its block.


@triton.jit
def _block(slots, order, first, pairs, ROWS: tl.constexpr):
    """Of the block that begins at ``first``: its slot, its pairs [ROWS], and which of them exist."""
    at = first + tl.arange(0, ROWS)
    slot = tl.load(slots + first)
    live = tl.load(slots + at, mask=at < pairs, other=-1) == slot
    return slot, tl.load(order + at, mask=live, other=0).to(tl.int64), live


@triton.jit
def _tile(
    matrix, x, row, live, line, K: tl.constexpr, ROWS: tl.constexpr, LINES: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """x[row] times lines of ``matrix`` [.., K]: [ROWS, LINES] in fp32."""
    D: tl.constexpr = x.dtype.element_ty
    total = tl.zeros([ROWS, LINES], tl.float32)
    for start in tl.range(0, K, DEPTH):
        k = (start + tl.arange(0, DEPTH))[None, :]
        v = tl.load(x + (row[:, None] * K + k), mask=live[:, None] & (k < K), other=0)
        w = tl.load(matrix + (line[:, None] * K + k), mask=k < K, other=0)
        total = tl.dot(v, tl.trans(w.to(D)), total, input_precision="ieee")
    return total


@triton.jit
def _tile_int4(
    codes, scales, x, row, live, line, K: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    LINES: tl.constexpr,
):  # fmt: skip
    """`_tile` of codes that lie as `formats.int4` says, a group of weights at a time: its low and
    its high nibbles meet what they multiply in x."""
    D: tl.constexpr = x.dtype.element_ty
    total = tl.zeros([ROWS, LINES], tl.float32)
    byte = tl.arange(0, GROUP // 2)
    for group in tl.range(0, K // GROUP):
        k = group * GROUP + byte // 16 * 32 + byte % 16
        at = x + (row[:, None] * K + k[None, :])
        low = tl.load(at, mask=live[:, None], other=0)
        high = tl.load(at + 16, mask=live[:, None], other=0)
        pairs = tl.load(codes + (line[:, None] * (K // 2) + (group * (GROUP // 2) + byte)[None, :]))
        scale = tl.load(scales + (line * (K // GROUP) + group)).to(tl.float32)
        part = tl.dot(low, tl.trans(((pairs & 15).to(tl.int8) - 8).to(D)), input_precision="ieee")
        high_codes = ((pairs >> 4).to(tl.int8) - 8).to(D)
        part = tl.dot(high, tl.trans(high_codes), part, input_precision="ieee")
        total += part * scale[None, :]
    return total


@triton.jit
def _tile_of_slab(
    slab, x, row, live, line, START: tl.constexpr, SCALES: tl.constexpr, K: tl.constexpr,
    KIND: tl.constexpr, TYPE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    LINES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """x[row] times lines of a matrix of the expert at ``slab``: [ROWS, LINES] in fp32."""
    if KIND == "int4":
        scales = (slab + SCALES).to(tl.pointer_type(tl.float16))
        total = _tile_int4(slab + START, scales, x, row, live, line, K, GROUP, ROWS, LINES)
    else:
        matrix = (slab + START).to(tl.pointer_type(TYPE))
        total = _tile(matrix, x, row, live, line, K, ROWS, LINES, DEPTH)
        if KIND == "int8":
            total *= tl.load((slab + SCALES).to(tl.pointer_type(tl.float32)) + line)[None, :]
    return total


@triton.jit(do_not_specialize=["pairs"])
def hidden_many(
    x, slots, order, blocks, arena, h, pairs, H: tl.constexpr, I: tl.constexpr,
    RANKS: tl.constexpr, SLOT: tl.constexpr, START: tl.constexpr, SCALES: tl.constexpr,
    KIND: tl.constexpr, TYPE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    LINES: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """`hidden` for blocks of pairs. Grid: (blocks, I / (LINES / 2)): blocks of one expert meet its
    weights in the cache. Lines of gate and up take turns, so that both of a product are neighbours.
    """
    first = tl.load(blocks + tl.program_id(0))
    if first < pairs:
        slot, pair, live = _block(slots, order, first, pairs, ROWS)
        lane = tl.arange(0, LINES)
        line = tl.minimum(tl.program_id(1) * (LINES // 2) + lane // 2, I - 1) + lane % 2 * I
        total = _tile_of_slab(
            arena + slot.to(tl.int64) * SLOT, x, pair // RANKS, live, line,
            START, SCALES, H, KIND, TYPE, GROUP, ROWS, LINES, DEPTH,
        )  # fmt: skip
        gate, up = tl.split(tl.reshape(total, [ROWS, LINES // 2, 2]))
        at = (tl.program_id(1) * (LINES // 2) + tl.arange(0, LINES // 2))[None, :]
        here = h + (pair[:, None] * I + at)
        tl.store(here, _gated(gate, up, h.dtype.element_ty), mask=live[:, None] & (at < I))


@triton.jit(do_not_specialize=["pairs"])
def down_many(
    h, slots, order, blocks, arena, into, pairs, H: tl.constexpr, I: tl.constexpr,
    SLOT: tl.constexpr, START: tl.constexpr, SCALES: tl.constexpr, KIND: tl.constexpr,
    TYPE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, LINES: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """`down` for blocks of pairs. Grid: (blocks, H / LINES)."""
    first = tl.load(blocks + tl.program_id(0))
    if first < pairs:
        slot, pair, live = _block(slots, order, first, pairs, ROWS)
        at = tl.program_id(1) * LINES + tl.arange(0, LINES)
        total = _tile_of_slab(
            arena + slot.to(tl.int64) * SLOT, h, pair, live, tl.minimum(at, H - 1),
            START, SCALES, I, KIND, TYPE, GROUP, ROWS, LINES, DEPTH,
        )  # fmt: skip
        here = into + (pair[:, None] * H + at[None, :])
        tl.store(here, total.to(into.dtype.element_ty), mask=live[:, None] & (at < H)[None, :])
