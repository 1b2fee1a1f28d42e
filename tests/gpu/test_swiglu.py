"""The expert MLP on a real accelerator: what the interpreter cannot show.

To be run by itself (``pytest tests/gpu``): other tests have Triton interpret its kernels.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.unit.experts.device.reference import (
    BF16,
    FP32,
    WAYS,
    Experts,
    near,
    same,
    summed,
)
from understudy import native
from understudy.core import STORED
from understudy.experts.device import tuning
from understudy.experts.device.cuda import Cuda, open_cuda
from understudy.experts.device.swiglu import FEW, Tiles

pytestmark = pytest.mark.gpu

SHAPES = [(2048, 768), (1024, 1408), (704, 352)]  # the last: no tile divides it


@pytest.fixture(scope="module")
def cuda() -> Cuda:
    if not torch.cuda.is_available() or find_spec("triton") is None:
        pytest.skip("no accelerator, or no triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("Triton interprets its kernels in this process: run tests/gpu by itself")
    return open_cuda("cuda")


def moved(cuda: Cuda, *tensors: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to(cuda.torch_device) for tensor in tensors]


@pytest.mark.parametrize(("format", "dtype", "stored"), WAYS)
@pytest.mark.parametrize("tokens", [1, FEW])
def test_few_tokens(
    cuda: Cuda, format: str, dtype: torch.dtype, stored: torch.dtype, tokens: int
) -> None:
    some = Experts(704, 352, format, dtype, stored, device=cuda)
    x, slots, weights = some.event(tokens, 3)
    got = some.kernel.few(*moved(cuda, x, slots, weights)).cpu()
    near(got, summed(some.pairs(x, slots), weights))


@pytest.mark.parametrize(("format", "dtype", "stored"), WAYS)
def test_many_tokens(cuda: Cuda, format: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    some = Experts(704, 352, format, dtype, stored, device=cuda)
    x, slots, _ = some.event(200, 2)
    into = torch.zeros(200, 2, 704, dtype=dtype, device=cuda.torch_device)
    some.kernel.many(*moved(cuda, x, slots), into)
    near(into.cpu(), some.pairs(x, slots))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", [STORED, "int8", "int4"])
def test_few_is_pairs_then_sum_bit_for_bit(cuda: Cuda, format: str, shape: tuple[int, int]) -> None:
    some = Experts(*shape, format, device=cuda)
    for tokens in range(1, FEW + 1):
        x, slots, weights = moved(cuda, *some.event(tokens, 8))
        into = torch.zeros(tokens, 8, shape[0], dtype=BF16, device=cuda.torch_device)
        some.kernel.pairs(x, slots, into)
        assert same(some.kernel.few(x, slots, weights), some.kernel.sum(into, weights))


@pytest.mark.parametrize("format", [STORED, "int8", "int4"])
def test_every_candidate_of_the_tiles_keeps_that_promise(cuda: Cuda, format: str) -> None:
    some = Experts(2048, 768, format, device=cuda)
    x, slots, weights = moved(cuda, *some.event(2, 8))
    usual = Tiles()
    for tiles in [Tiles(hidden=t) for t in tuning.HIDDEN] + [Tiles(down=t) for t in tuning.DOWN]:
        kernel = some.swiglu(tiles=tiles)
        into = torch.zeros(2, 8, 2048, dtype=BF16, device=cuda.torch_device)
        kernel.pairs(x, slots, into)
        assert same(kernel.few(x, slots, weights), kernel.sum(into, weights))
        near(kernel.few(x, slots, weights), some.swiglu(tiles=usual).few(x, slots, weights))


@pytest.mark.parametrize("format", [STORED, "int8", "int4"])
def test_a_token_is_the_same_in_company(cuda: Cuda, format: str) -> None:
    some = Experts(2048, 768, format, device=cuda)
    x, slots, weights = moved(cuda, *some.event(FEW, 8))
    together = some.kernel.few(x, slots, weights)
    for token in range(FEW):
        one = slice(token, token + 1)
        assert same(some.kernel.few(x[one], slots[one], weights[one]), together[one])


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_pair_of_many_does_not_depend_on_its_block(cuda: Cuda, dtype: torch.dtype) -> None:
    """Not even on its place in it: without the first tokens, all others move up."""
    some = Experts(704, 352, STORED, dtype, dtype, device=cuda)
    x, slots, _ = moved(cuda, *some.event(200, 2))
    whole = torch.zeros(200, 2, 704, dtype=dtype, device=cuda.torch_device)
    rest = torch.zeros(193, 2, 704, dtype=dtype, device=cuda.torch_device)
    some.kernel.many(x, slots, whole)
    some.kernel.many(x[7:].contiguous(), slots[7:].contiguous(), rest)
    assert same(rest, whole[7:])


def test_recorded_in_a_graph(cuda: Cuda) -> None:
    """Replayed with other inputs in the same places: what is launched then is what would be."""
    some = Experts(2048, 768, device=cuda)
    x, slots, weights = moved(cuda, *some.event(2, 8))
    into = torch.zeros(2, 8, 2048, dtype=BF16, device=cuda.torch_device)
    some.kernel.few(x, slots, weights)
    some.kernel.many(x, slots, into)
    graph = cuda.graph()
    graph.begin()
    try:
        few = some.kernel.few(x, slots, weights)
        some.kernel.many(x, slots, into)
    finally:
        graph.end()
    for place, new in zip((x, slots, weights), some.event(2, 8, seed=1), strict=True):
        place.copy_(new)
    into.zero_()
    graph.replay()
    again = torch.zeros_like(into)
    some.kernel.many(x, slots, again)
    assert same(few, some.kernel.few(x, slots, weights))
    assert same(into, again)


def test_tiles_are_measured_and_kept(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(native, "cache_folder", lambda: tmp_path)
    some = Experts(2048, 768, device=cuda, count=16)
    trial = tuning.Trial(cuda, some.slab, STORED, BF16, some.arena, some.slot_bytes, ranks=8)
    found = tuning.choose(trial)
    assert set(found.microseconds) == {"few", "many"}
    monkeypatch.setattr(tuning, "_measure", lambda trial: pytest.fail("measured twice"))
    assert tuning.choose(trial) == found
