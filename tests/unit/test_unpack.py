"""Codes unpacked in C are, to the bit, the numbers that torch makes of them."""

from __future__ import annotations

import pytest
import torch

from understudy import formats, native

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no kernel: {native.why_not()}")


def unpacked(
    format: formats.WeightFormat, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    k = codes.shape[1] * 8 // format.bits
    group = k // scales.shape[1] if scales.ndim > 1 else 0
    return native.unpack(codes, scales, k, format.name, group, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "lines", "k"),
    [("int8", 7, 96), ("int8", 3, 45), ("int4", 5, 128), ("int4", 33, 96), ("mxfp4", 6, 160)],
)
def test_as_torch_unpacks(name: str, lines: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(lines)
    format = formats.get(name)
    packed = format.pack(torch.randn(lines, k) * torch.logspace(-6, 1, lines)[:, None])
    codes, scales = packed[formats.CODES], packed[formats.SCALES]
    expected = format.unpack(codes, scales, dtype)
    found = unpacked(format, codes, scales, dtype)
    assert found.dtype == dtype and torch.equal(found, expected)


@pytest.mark.parametrize("name", ["int8", "int4", "mxfp4"])
def test_lines_that_lie_apart(name: str) -> None:
    format = formats.get(name)
    packed = format.pack(torch.randn(8, 64))
    codes, scales = packed[formats.CODES], packed[formats.SCALES]
    wide = torch.zeros(8, codes.shape[1] + 16, dtype=codes.dtype)
    wide[:, :-16] = codes
    apart = wide[:, :-16]
    assert not apart.is_contiguous()
    expected = format.unpack(codes, scales, torch.bfloat16)
    assert torch.equal(unpacked(format, apart, scales, torch.bfloat16), expected)


def test_every_byte_and_every_scale_of_mxfp4() -> None:
    """All 256 exponents: the smallest are denormal, the largest overflow, as torch has it."""
    format = formats.get("mxfp4")
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    scales = torch.arange(256, dtype=torch.uint8)[:, None].repeat(1, 16)
    for dtype in (torch.float32, torch.bfloat16):
        expected = format.unpack(codes, scales, dtype)
        assert torch.equal(unpacked(format, codes, scales, dtype), expected)


def test_scales_that_are_not_numbers() -> None:
    """A damaged checkpoint shows: NaN and infinity stay what they are."""
    format = formats.get("int4")
    codes = torch.full((2, 32), 0x9A, dtype=torch.uint8)
    scales = torch.tensor([[torch.nan], [torch.inf]], dtype=torch.float16)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        found = unpacked(format, codes, scales, dtype)
        assert found[0].isnan().all() and found[1].isinf().all()
