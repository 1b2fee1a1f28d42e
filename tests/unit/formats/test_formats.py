"""Formats against bytes worked out by hand, slow obvious versions, and their error bounds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors

from understudy import formats
from understudy.core import STORED, UnknownName
from understudy.formats import CannotPack, int4
from understudy.registry import FORMATS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def matrix(out: int, inner: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    dice = torch.Generator().manual_seed(seed)
    return torch.randn(out, inner, generator=dice) * scale


def parts(name: str, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    packed = formats.get(name).pack(weights)
    return packed[""], packed["_scales"]


# ------------------------------------------------------------------------------ hand-known bytes


def test_int8_by_hand() -> None:
    codes, scales = parts("int8", torch.tensor([[1.27, -0.64, 0.0], [0, 0, 0], [-254, 127, 2.0]]))
    assert codes.dtype == torch.int8
    assert codes.tolist() == [[127, -64, 0], [0, 0, 0], [-127, 64, 1]]
    assert torch.allclose(scales, torch.tensor([0.01, 0, 2]))
    assert scales.dtype == torch.float32


def test_int4_by_hand() -> None:
    """Weights -8..7 twice, in steps of 0.5: one candidate scale (-4 / -8) loses nothing."""
    row = torch.tensor([0.5 * (i % 16 - 8) for i in range(32)])
    codes, scales = parts("int4", row[None])
    assert scales.dtype == torch.float16
    assert scales.tolist() == [[0.5]]
    assert codes.tolist() == [[i | i << 4 for i in range(16)]]
    row[16:] = 0  # high halves: the second sixteen
    codes, _ = parts("int4", row[None])
    assert codes.tolist() == [[i | 8 << 4 for i in range(16)]]


def test_mxfp4_by_hand() -> None:
    row = torch.zeros(32)
    row[:4] = torch.tensor([6.0, -0.5, 1.5, -4.0])
    codes, scales = parts("mxfp4", row[None] * 2**-5)
    assert scales.tolist() == [[127 - 5]]
    assert codes.tolist() == [[0x97, 0xE3] + [0] * 14]


def test_mxfp4_rounds_to_the_nearest_value_and_ties_to_even_codes() -> None:
    row = torch.zeros(32)
    row[:8] = torch.tensor([6.0, 0.2, 0.25, 0.3, 5.0, 2.5, 3.5, -0.75])
    codes, _ = parts("mxfp4", row[None])
    low = [code & 15 for code in codes[0, :4].tolist()]
    high = [code >> 4 for code in codes[0, :4].tolist()]
    assert [x for pair in zip(low, high, strict=True) for x in pair] == [7, 0, 0, 1, 6, 4, 6, 10]


def test_ct_int4_by_hand() -> None:
    """Weights -7..7 in steps of 0.25 and eight in a word, lowest bits first."""
    row = torch.tensor([0.25 * v for v in (-8, -7, 0, 1, 2, 3, 4, 7)] + [0.0] * 24)
    words = torch.tensor([[0x0F << 28 | 0xCBA9810 - (1 << 32), *[0x88888888 - (1 << 32)] * 3]])
    scales = torch.tensor([[0.25]], dtype=torch.bfloat16)
    unpacked = formats.get("ct-int4").unpack(words.to(torch.int32), scales, torch.float32)
    assert unpacked.tolist() == [row.tolist()]
    codes, scales = parts("ct-int4", row[None] * 7.5 / 8)
    assert codes.tolist() == words.tolist()
    assert scales.tolist() == [[0.25]]


def test_zeros_stay_zeros() -> None:
    for name in ("int8", "int4", "mxfp4", "ct-int4"):
        codes, scales = parts(name, torch.zeros(3, 64))
        assert not scales.any()
        assert not formats.get(name).unpack(codes, scales, torch.float32).any()


# ----------------------------------------------------------------------- slow and obvious versions


def int4_slowly(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    out, inner = codes.shape[0], 2 * codes.shape[1]
    result = torch.zeros(out, inner)
    group = inner // scales.shape[1]
    for row in range(out):
        for k in range(inner):
            block, place = divmod(k, 32)
            byte = int(codes[row, 16 * block + place % 16])
            code = byte & 15 if place < 16 else byte >> 4
            result[row, k] = (code - 8) * float(scales[row, k // group])
    return result


@pytest.mark.parametrize("inner", [32, 64, 96, 128, 192])
def test_int4_unpacks_as_the_slow_version(inner: int) -> None:
    codes, scales = parts("int4", matrix(5, inner))
    assert scales.shape == (5, inner // (64 if inner % 64 == 0 else 32))
    slow = int4_slowly(codes, scales)
    for dtype in DTYPES:
        assert formats.get("int4").unpack(codes, scales, dtype).equal(slow.to(dtype))


def test_int4_searches_as_the_slow_version() -> None:
    weights = matrix(7, 64)
    codes, scales = parts("int4", weights)
    fast = formats.get("int4").unpack(codes, scales, torch.float64)
    for row, found in zip(weights.double().tolist(), fast.tolist(), strict=True):
        largest = max(row, key=abs)
        tried = [largest * s / -8 for s in int4.TO_MINUS_8] + [abs(largest) * s / 7 for s in
                                                              int4.TO_7]  # fmt: skip
        errors = []
        for scale in (float(torch.tensor(t).half()) for t in tried):
            codes_ = [min(15, max(0, round(w / scale) + 8)) for w in row]
            errors.append(sum((w - (q - 8) * scale) ** 2 for w, q in zip(row, codes_, strict=True)))
        got = sum((w - f) ** 2 for w, f in zip(row, found, strict=True))
        assert math.isclose(got, min(errors), rel_tol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mxfp4_has_the_bits_of_transformers(dtype: torch.dtype) -> None:
    """Every byte under every scale, overflow and subnormal results included."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 16).contiguous()
    blocks = codes.view(1, 256, 16, 16)
    theirs = convert_moe_packed_tensors(blocks, scales[None], dtype=dtype)[0].T
    ours = formats.get("mxfp4").unpack(codes, scales, dtype)
    assert ours.dtype == dtype
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert ours.contiguous().view(whole).equal(theirs.contiguous().view(whole))
    assert tuple(FP4_VALUES) == formats.mxfp4.VALUES


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("shape", [(256, 384), (128, 128), (96, 64)])
def test_fp8_has_the_bits_of_transformers(shape: tuple[int, int], dtype: torch.dtype) -> None:
    codes, scales = parts("fp8", matrix(*shape))
    theirs = Fp8Dequantize(None)._dequantize_one(codes, scales, dtype)
    assert formats.get("fp8").unpack(codes, scales, dtype).equal(theirs)


def test_fp8_blocks_may_be_cut_short() -> None:
    weights = matrix(130, 200)
    codes, scales = parts("fp8", weights)
    assert scales.shape == (2, 2)
    back = formats.get("fp8").unpack(codes, scales, torch.float32)
    for row, column in ((0, 0), (127, 127), (128, 127), (127, 128), (129, 199)):
        by_hand = codes[row, column].float() * scales[row // 128, column // 128]
        assert back[row, column] == by_hand
    assert bool(((back - weights).abs() <= weights.abs() / 16 + scales.max() / 100).all())


def test_fp8_scales_may_be_exponents() -> None:
    codes = torch.tensor([[1.0, -2.0]]).to(torch.float8_e4m3fn)
    scales = torch.tensor([[130]], dtype=torch.uint8)
    assert formats.get("fp8").unpack(codes, scales, torch.float32).tolist() == [[8.0, -16.0]]


# ---------------------------------------------------------------------------------- error bounds

SHAPES = st.tuples(st.integers(1, 6), st.sampled_from([32, 64, 96, 160]))
SIZES = st.floats(1e-4, 1e3)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 10**6), SIZES)
def test_int8_error_is_half_a_step(shape: tuple[int, int], seed: int, scale: float) -> None:
    weights = matrix(*shape, seed, scale)
    codes, scales = parts("int8", weights)
    back = formats.get("int8").unpack(codes, scales, torch.float32)
    assert bool(((back - weights).abs() <= scales[:, None] * 0.5001).all())


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 10**6), SIZES)
def test_int4_error_is_small(shape: tuple[int, int], seed: int, scale: float) -> None:
    """No group is worse than plain rounding with its largest weight at 7."""
    weights = matrix(*shape, seed, scale)
    codes, scales = parts("int4", weights)
    back = formats.get("int4").unpack(codes, scales, torch.float32)
    groups = weights.view(shape[0], scales.shape[1], -1)
    plain_scale = (groups.abs().amax(2, keepdim=True) / 7).half().float()
    plain = (groups / plain_scale).round().clamp(-8, 7) * plain_scale
    error = (back.view_as(groups) - groups).square().sum(2)
    assert bool((error <= (plain - groups).square().sum(2) * 1.0001 + 1e-12).all())


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.integers(0, 10**6), SIZES)
def test_mxfp4_error_is_bounded(shape: tuple[int, int], seed: int, scale: float) -> None:
    weights = matrix(*shape, seed, scale)
    codes, scales = parts("mxfp4", weights)
    back = formats.get("mxfp4").unpack(codes, scales, torch.float32)
    blocks = weights.view(shape[0], -1, 32)
    step = torch.exp2(scales.double() - 127)[:, :, None] * 2  # beyond 6 weights are cut to 6
    assert bool(((back.view_as(blocks) - blocks).abs() <= step).all())
    again_codes, again_scales = parts("mxfp4", back)
    assert again_scales.equal(scales)
    assert again_codes.equal(codes)


@pytest.mark.parametrize("name", FORMATS.builtin_names)
def test_sizes_are_foretold(name: str) -> None:
    found = formats.get(name)
    for out, inner in ((3, 64), (2, 96), (5, 32)):
        packed = found.pack(matrix(out, inner))
        assert sum(part.nbytes for part in packed.values()) == found.nbytes(out, inner)
        assert 8 * packed[""].nbytes == out * inner * found.bits
        back = found.unpack(packed[""], packed.get("_scales"), torch.float32)
        assert back.shape == (out, inner)


# -------------------------------------------------------------------------------------- refusals


def test_refusals_name_the_cure() -> None:
    with pytest.raises(CannotPack, match="a row here has 48: use int8"):
        formats.get("int4").pack(matrix(2, 48))
    with pytest.raises(CannotPack, match="use int8"):
        formats.get("int4").pack(torch.full((1, 32), 1e6))
    for name in ("int4", "int8"):
        with pytest.raises(CannotPack, match="NaN"):
            formats.get(name).pack(torch.full((1, 32), math.nan))
    with pytest.raises(UnknownName, match="did you mean 'int4'"):
        formats.get("int-4")


def test_which_formats_are_lossy() -> None:
    assert formats.lossy_names() == ("int8", "int4")
    assert formats.is_exact(STORED)
    assert formats.is_exact("mxfp4")
    assert not formats.is_exact("int4")
