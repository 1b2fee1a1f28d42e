"""The expert MLP of the device, interpreted, against one pair at a time in torch."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

if find_spec("triton") is None:  # not imported yet: the next line says how
    pytest.skip("triton is not installed", allow_module_level=True)

from tests import interpreted  # noqa: F401  before the kernels
from tests.unit.experts.device.reference import (
    BF16,
    FP32,
    WAYS,
    Experts,
    layout_of,
    near,
    same,
    summed,
)
from understudy.core import STORED
from understudy.experts.device import swiglu
from understudy.experts.device.slab import Slab
from understudy.experts.device.swiglu import (
    Block,
    Strip,
    Swiglu,
    Tiles,
    _blocks,
    _matrix,
    _rows,
    weight_bytes,
    why_not,
)

# Few programs, because each costs milliseconds; not all fit the shapes below.
LARGE = Tiles(Strip(rows=32, lanes=16), Strip(rows=32, lanes=16), Block(rows=16, lines=64))
SMALL = Tiles(Strip(rows=8, lanes=2, unroll=3), Strip(rows=8, lanes=4, unroll=2, together=2))


def experts(format: str, dtype: torch.dtype, stored: torch.dtype, **how: object) -> Experts:
    """Shapes that no tile divides, as far as the format allows."""
    hidden, width = (96, 64) if format == "int4" else (88, 40)
    return Experts(hidden, width, format, dtype, stored, tiles=LARGE, **how)


def pairs(kernel: Swiglu, x: torch.Tensor, slots: torch.Tensor, many: bool = False) -> torch.Tensor:
    into = torch.zeros(*slots.shape, x.shape[1], dtype=x.dtype)
    (kernel.many if many else kernel.pairs)(x, slots, into)
    return into


@pytest.mark.parametrize(("format", "dtype", "stored"), WAYS)
def test_few_tokens(format: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    some = experts(format, dtype, stored)
    x, slots, weights = some.event(2, 3)
    near(some.kernel.few(x, slots, weights), summed(some.pairs(x, slots), weights))


@pytest.mark.parametrize(("format", "dtype", "stored"), WAYS)
def test_many_tokens(format: str, dtype: torch.dtype, stored: torch.dtype) -> None:
    some = experts(format, dtype, stored)
    x, slots, _ = some.event(37, 2)
    near(pairs(some.kernel, x, slots, many=True), some.pairs(x, slots))


@pytest.mark.parametrize("format", [STORED, "int8", "int4"])
def test_few_is_pairs_then_sum(format: str) -> None:
    some = experts(format, BF16, BF16)
    x, slots, weights = some.event(8, 2)
    outs = pairs(some.kernel, x, slots)
    near(outs, some.pairs(x, slots))
    assert same(some.kernel.few(x, slots, weights), some.kernel.sum(outs, weights))


def test_pairs_that_come_one_after_the_other_are_the_same() -> None:
    some = experts(STORED, BF16, BF16)
    x, slots, _ = some.event(4, 3)
    into = torch.zeros(4, 3, some.hidden, dtype=BF16)
    for expert in (3, 0, 4, 1, 2):
        some.kernel.pairs(x, torch.where(slots == expert, slots, -1), into)
    assert same(into, pairs(some.kernel, x, slots))


def test_a_token_is_the_same_in_company() -> None:
    some = experts(STORED, BF16, BF16)
    x, slots, weights = some.event(8, 2)
    together = some.kernel.few(x, slots, weights)
    for one in (slice(0, 1), slice(5, 6)):
        assert same(some.kernel.few(x[one], slots[one], weights[one]), together[one])


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_an_expert_of_many_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    some = experts(STORED, dtype, dtype)
    x, slots, _ = some.event(37, 2)
    alone = torch.where(slots == 2, slots, -1)
    assert same(
        pairs(some.kernel, x, alone, many=True)[slots == 2],
        pairs(some.kernel, x, slots, many=True)[slots == 2],
    )


def test_blocks_may_come_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """None writes what is another's, which would show only where it writes last."""
    some = experts(STORED, BF16, BF16)
    x, slots, _ = some.event(37, 2)
    forwards = pairs(some.kernel, x, slots, many=True)
    monkeypatch.setattr(swiglu, "_blocks", lambda *how: _blocks(*how).flip(0))
    assert same(pairs(some.kernel, x, slots, many=True), forwards)


@pytest.mark.parametrize("many", [False, True])
def test_what_nobody_computes_stays_as_it_is(many: bool) -> None:
    some = experts("int8", BF16, BF16)
    x, slots, _ = some.event(6, 2)
    into = torch.full((6, 2, some.hidden), 7, dtype=BF16)
    (some.kernel.many if many else some.kernel.pairs)(x, slots, into)
    assert (slots < 0).any()
    assert bool((into[slots < 0] == 7).all())
    near(into[slots >= 0], some.pairs(x, slots)[slots >= 0])


@pytest.mark.parametrize("many", [False, True])
def test_nobody_at_all(many: bool) -> None:
    some = experts(STORED, BF16, BF16)
    x, slots, weights = some.event(3, 2)
    nobody = torch.full_like(slots, -1)
    assert not pairs(some.kernel, x, nobody, many).any()
    assert not some.kernel.few(x, nobody, weights).any()


def test_a_free_slot_is_not_read() -> None:
    """Neither for a pair without an expert nor because it is the first: it may hold NaN."""
    some = experts(STORED, BF16, BF16)
    x, slots, weights = some.event(8, 2)
    some.arena[: some.slot_bytes] = 255
    slots = torch.where(slots == 0, -1, slots)
    assert bool(some.kernel.few(x, slots, weights).isfinite().all())


@pytest.mark.parametrize("format", [STORED, "int8", "int4"])
def test_other_tiles_differ_by_rounding_only(format: str) -> None:
    some = experts(format, BF16, BF16)
    x, slots, weights = some.event(1, 2)
    near(some.swiglu(tiles=SMALL).few(x, slots, weights), some.kernel.few(x, slots, weights))


@pytest.mark.parametrize("weights_dtype", [BF16, FP32])
def test_the_sum_is_rounded_once(weights_dtype: torch.dtype) -> None:
    """A number that bf16 cannot add to 1, three times, can be added to 1 together."""
    some = Experts(8, 8, count=1)
    outs = torch.tensor([1.0, 2**-9, 2**-9, 2**-9])[None, :, None].expand(1, 4, 8).to(BF16)
    got = some.kernel.sum(outs.contiguous(), torch.ones(1, 4, dtype=weights_dtype))
    assert got.tolist() == [[1 + 2**-7] * 8]


@pytest.mark.parametrize(("rows", "distinct"), [(1, 9), (2, 9), (4, 3), (16, 9)])
def test_blocks(rows: int, distinct: int) -> None:
    """Against cutting each run of equal slots into pieces."""
    for seed in range(20):
        dice = torch.Generator().manual_seed(seed)
        slots = torch.randint(-1, distinct, (seed + 1,), generator=dice).sort().values
        runs = [(slots == s).nonzero().flatten().tolist() for s in range(distinct)]
        wanted = [run[i] for run in runs for i in range(0, len(run), rows)]
        found = _blocks(slots, rows, distinct).tolist()
        assert found == wanted + [len(slots)] * (len(found) - len(wanted))


def test_a_row_of_weights_takes_whole_turns() -> None:
    """11 chunks at up to 4 at a time: three turns of 4, not two of 5 and not eleven of 1."""
    slab = Experts(11 * 256, 8, count=1).slab
    options = _rows(_matrix(slab, "gate_up_proj", STORED), Strip(lanes=32, unroll=4))
    assert options["T"].chunk == 256
    assert options["T"].unroll == 4
    assert _rows(_matrix(slab, "down_proj", STORED), Strip(unroll=4))["T"].unroll == 1


def _slab(format: str = STORED, transposed: bool = False, **fields: torch.Tensor) -> Slab:
    return Slab.of(layout_of(fields, format), transposed=transposed)


def test_what_the_kernels_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    two = {"gate_up_proj": torch.empty(8, 4), "down_proj": torch.empty(4, 4)}
    assert why_not(_slab(**two), STORED, FP32) is None
    assert why_not(_slab(**two), "fp8", FP32) == "no kernel reads fp8"
    assert why_not(_slab(**two), STORED, torch.float64) == "no kernel for torch.float64"
    assert "transposed" in str(why_not(_slab(transposed=True, **two), STORED, FP32))
    biased = {**two, "down_proj_bias": torch.empty(4)}
    assert "down_proj_bias" in str(why_not(_slab(**biased), STORED, FP32))
    monkeypatch.setattr("understudy.experts.device.swiglu.find_spec", lambda name: None)
    assert why_not(_slab(**two), STORED, FP32) == "triton is not installed"


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_packed_experts_can_be_read(format: str) -> None:
    assert why_not(experts(format, BF16, BF16).slab, format, BF16) is None


def test_bytes_that_must_be_read() -> None:
    some = Experts(64, 32, "int8", count=1)
    assert weight_bytes(some.slab, 3) == 3 * (3 * 64 * 32 + 4 * (2 * 32 + 64))
