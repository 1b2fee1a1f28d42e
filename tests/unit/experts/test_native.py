"""The native kernel against plain arithmetic, and its promise: a token's bits depend on nobody."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from understudy import formats, native
from understudy.core import STORED
from understudy.experts.compute import Batch, ExpertMlp
from understudy.experts.store import Weights

pytestmark = pytest.mark.skipif(native.library() is None, reason=f"no kernel: {native.why_not()}")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CLOSE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def product(x: torch.Tensor, codes: torch.Tensor, kind: str) -> torch.Tensor:
    return native.linears(x, [(codes, None)], kind)[0]


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("k", [1, 17, 32, 96, 128, 200, 1024])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9])
def test_products_of_plain_weights(stored: str, k: int, rows: int) -> None:
    torch.manual_seed(k + rows)
    weights = torch.randn(37, k).to(DTYPES[stored])
    for dtype in (DTYPES[stored], torch.float32):
        x = torch.randn(rows, k).to(dtype)
        expected = (x.double() @ weights.double().T).to(dtype)
        found = product(x, weights, stored)
        assert (found - expected).abs().max() <= CLOSE[dtype] * expected.abs().max()


def test_int8_with_known_numbers() -> None:
    codes = torch.tensor([[1, -2, 3], [127, 0, -127]], dtype=torch.int8)
    scales = torch.tensor([0.5, 2.0])
    x = torch.tensor([[1.0, 1.0, 1.0], [2.0, 0.0, 1.0]])
    found = native.linears(x, [(codes, scales)], "int8")[0]
    assert found.tolist() == [[1.0, 0.0], [2.5, 254.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "group"), [(32, 32), (64, 64), (64, 32), (96, 32), (2112, 64)])
@pytest.mark.parametrize("rows", [1, 2, 6])
def test_int4_weights_as_they_are_packed(dtype: torch.dtype, k: int, group: int, rows: int) -> None:
    torch.manual_seed(k)
    q = torch.randint(0, 16, (5, k))
    scales = (torch.rand(5, k // group) + 0.5).half()
    codes = torch.zeros(5, k // 2, dtype=torch.uint8)
    for line in range(5):
        for i in range(k):  # the slow, obvious version of the layout
            block, at = divmod(i, 32)
            shift = 0 if at < 16 else 4
            codes[line, 16 * block + at % 16] |= int(q[line, i]) << shift
    weights = (q - 8) * scales.float().repeat_interleave(group, 1)
    x = torch.randn(rows, k).to(dtype)
    expected = (x.double() @ weights.double().T).to(dtype)
    found = native.linears(x, [(codes, scales)], "int4", group)[0]
    assert (found - expected).abs().max() <= CLOSE[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [32, 64, 160, 1120])
def test_mxfp4_weights_as_gpt_oss_stores_them(dtype: torch.dtype, k: int) -> None:
    torch.manual_seed(k)
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    q = torch.randint(0, 16, (5, k))
    exponents = torch.randint(120, 132, (5, k // 32), dtype=torch.uint8)
    codes = (q[:, 0::2] | q[:, 1::2] << 4).to(torch.uint8)
    weights = values[q] * (2.0 ** (exponents.float() - 127)).repeat_interleave(32, 1)
    x = torch.randn(3, k).to(dtype)
    expected = (x.double() @ weights.double().T).to(dtype)
    found = native.linears(x, [(codes, exponents)], "mxfp4", 32)[0]
    assert (found - expected).abs().max() <= CLOSE[dtype] * expected.abs().max()


def test_the_smallest_scale_of_mxfp4_is_not_zero() -> None:
    codes = torch.full((1, 16), 0x22, dtype=torch.uint8)  # thirty-two ones
    scales = torch.zeros(1, 1, dtype=torch.uint8)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.full((1, 32), 2.0**100, dtype=dtype)
        assert native.linears(x, [(codes, scales)], "mxfp4", 32)[0].item() == 2.0**-22


# Integer weights against bf16 inputs: inputs become integers that share an exponent per 128.

KINDS = {"int8": 0, "int4": 64, "mxfp4": 32}  # and how many weights share a scale


def some_codes(kind: str, lines: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    if kind == "int8":
        codes = torch.randint(-128, 128, (lines, k), dtype=torch.int8)
        return codes, torch.rand(lines) + 0.5
    codes = torch.randint(0, 256, (lines, k // 2), dtype=torch.uint8)
    if kind == "int4":
        return codes, (torch.rand(lines, k // 64) + 0.5).half()
    return codes, torch.randint(120, 132, (lines, k // 32), dtype=torch.uint8)


@pytest.mark.parametrize("k", [1, 63, 64, 65, 127, 128, 129, 200, 1100])
def test_int8_lines_of_any_length(k: int) -> None:
    torch.manual_seed(k)
    codes, scales = some_codes("int8", 19, k)
    x = torch.randn(3, k).bfloat16()
    expected = (x.double() @ (codes.double() * scales.double()[:, None]).T).bfloat16()
    found = native.linears(x, [(codes, scales)], "int8")[0]
    assert (found - expected).abs().max() <= CLOSE[torch.bfloat16] * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0.0, 2.0**-100, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("outlier", [1, 1000])
def test_bf16_inputs_of_every_size_agree_with_fp32_ones(
    kind: str, size: float, outlier: int
) -> None:
    torch.manual_seed(1)
    codes, scales = some_codes(kind, 33, 448)
    x = (torch.randn(2, 448) * size).bfloat16()
    x[:, 77] *= outlier
    expected = native.linears(x.float(), [(codes, scales)], kind, KINDS[kind])[0]
    found = native.linears(x, [(codes, scales)], kind, KINDS[kind])[0]
    assert (found - expected).abs().max() <= 2**-8 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_an_input_that_is_no_number_never_looks_like_one(kind: str, bad: float) -> None:
    codes, scales = some_codes(kind, 5, 320)
    codes[codes == 0] = 1  # infinity times zero is another matter
    x = torch.ones(2, 320).bfloat16()
    x[0, 200] = bad
    found = native.linears(x, [(codes, scales)], kind, KINDS[kind])[0]
    assert not found[0].isfinite().any()
    assert found[1].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_bits_of_integer_products_depend_on_no_other_row(kind: str) -> None:
    torch.manual_seed(2)
    codes, scales = some_codes(kind, 37, 704)
    x = torch.randn(9, 704).bfloat16()
    alone = [native.linears(row[None], [(codes, scales)], kind, KINDS[kind])[0] for row in x]
    for rows in range(1, 10):
        for first in (0, 9 - rows):
            some = x[first : first + rows]
            found = native.linears(some, [(codes, scales)] * 2, kind, KINDS[kind])
            expected = torch.cat(alone[first : first + rows])
            assert torch.equal(found[0], expected) and torch.equal(found[1], expected)


# ------------------------------------------------------------------------------ whole experts


class _Module:
    """What `ExpertMlp` asks of an Experts module."""

    is_transposed, has_gate, has_post_expert_norm = False, True, False

    def __init__(self) -> None:
        from transformers.activations import ACT2FN
        from transformers.integrations.moe import _default_apply_gate

        self.act_fn = ACT2FN["silu"]
        self._apply_gate = _default_apply_gate.__get__(self)


def experts(count: int, hidden: int, width: int, dtype: torch.dtype) -> list[Weights]:
    torch.manual_seed(count)
    made = []
    for _ in range(count):
        up, down = torch.randn(2 * width, hidden) * 0.2, torch.randn(hidden, width) * 0.2
        made.append(Weights(gate_up_proj=(up.to(dtype),), down_proj=(down.to(dtype),)))
    return made


def run(
    x: torch.Tensor, ids: list[list[int]], some: list[Weights], groups: list[list[int]], rows: int,
    format: str = STORED,
) -> torch.Tensor:  # fmt: skip
    mlp = ExpertMlp(_Module(), format, native_rows=rows)
    batch = Batch(x, ids, torch.ones(len(ids), len(ids[0]), dtype=x.dtype))
    for group in groups:
        batch.compute_many([(e, some[e]) for e in group], mlp)
    return batch.out


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize(("hidden", "width"), [(64, 32), (40, 24), (256, 96)])
def test_whole_experts_agree_with_torch(dtype: torch.dtype, hidden: int, width: int) -> None:
    some = experts(4, hidden, width, dtype)
    x = torch.randn(3, hidden).to(dtype)
    ids = [[0, 1], [2, 1], [1, 3]]
    ours = run(x, ids, some, [[0, 1, 2, 3]], rows=8)
    theirs = run(x, ids, some, [[0, 1, 2, 3]], rows=0)
    assert (ours - theirs).abs().max() <= 2 * CLOSE[dtype] * theirs.abs().max()


@pytest.mark.parametrize("dtype", DTYPES.values())
def test_bits_depend_neither_on_company_nor_on_order_nor_on_threads(dtype: torch.dtype) -> None:
    some = experts(4, 96, 80, dtype)
    x = torch.randn(3, 96).to(dtype)
    ids = [[0, 1], [2, 1], [1, 3]]
    together = run(x, ids, some, [[0, 1, 2, 3]], rows=8)
    assert torch.equal(together, run(x, ids, some, [[3], [1], [0], [2]], rows=8))
    assert torch.equal(together, run(x, ids, some, [[2, 0], [3, 1]], rows=8))
    alone = [run(x[t : t + 1], [ids[t]], some, [ids[t]], rows=8) for t in range(3)]
    assert torch.equal(together, torch.cat(alone))
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            assert torch.equal(together, run(x, ids, some, [[0, 1, 2, 3]], rows=8))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("kind", ["int8", "int4", "ct-int4", "fp8", "mxfp4"])
def test_weights_on_a_device_are_left_to_torch(kind: str) -> None:
    """Meta tensors stand in for those of a device: C could read neither, and torch lets neither
    meet a tensor of the processor."""
    made: dict[str, tuple[torch.Tensor, ...]] = {}
    for name, shape in (("gate_up_proj", (256, 128)), ("down_proj", (128, 128))):
        codes, scales = formats.get(kind).pack(torch.randn(*shape)).values()
        made |= {name: (codes.to("meta"),), f"{name}_scales": (scales.to("meta"),)}
    x = torch.empty(4, 128, dtype=torch.bfloat16, device="meta")
    assert ExpertMlp(_Module(), kind, native_rows=8)(x, Weights(made)).shape == (4, 128)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_bits_of_packed_experts_depend_neither_on_company_nor_on_threads(kind: str) -> None:
    torch.manual_seed(3)
    coder, some = formats.get(kind), []
    for _ in range(4):
        made: dict[str, tuple[torch.Tensor, ...]] = {}
        for name, shape in (("gate_up_proj", (384, 160)), ("down_proj", (160, 192))):
            codes, scales = coder.pack(torch.randn(*shape) * 0.2).values()
            made |= {name: (codes,), f"{name}_scales": (scales,)}
        some.append(Weights(made))
    x = torch.randn(3, 160).bfloat16()
    ids = [[0, 1], [2, 1], [1, 3]]
    together = run(x, ids, some, [[0, 1, 2, 3]], rows=8, format=kind)
    theirs = run(x, ids, some, [[0, 1, 2, 3]], rows=0, format=kind)
    assert (together - theirs).abs().max() <= 2 * CLOSE[x.dtype] * theirs.abs().max()
    assert torch.equal(together, run(x, ids, some, [[3], [1], [0], [2]], rows=8, format=kind))
    alone = [run(x[t : t + 1], [ids[t]], some, [ids[t]], 8, kind) for t in range(3)]
    assert torch.equal(together, torch.cat(alone))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(together, run(x, ids, some, [[0, 1, 2, 3]], rows=8, format=kind))
    finally:
        torch.set_num_threads(threads)


def test_an_expert_chosen_twice_by_one_token_fills_both_places() -> None:
    some = experts(2, 32, 16, torch.float32)
    x = torch.randn(1, 32)
    out = run(x, [[1, 1]], some, [[1]], rows=8)
    assert torch.equal(out[0], out[1]) and out[0].abs().sum() > 0


def test_silu_of_every_size_stays_a_number() -> None:
    """exp must neither overflow nor lose the sign of a large gate."""
    gates = torch.tensor([-1e30, -100.0, -87.0, -1.0, 0.0, 1.0, 87.0, 100.0, 1e30])
    for gate in gates.tolist():
        up = torch.tensor([[gate], [1.0]])
        some = [Weights(gate_up_proj=(up,), down_proj=(torch.ones(1, 1),))]
        found = run(torch.ones(1, 1), [[0]], some, [[0]], rows=8).item()
        expected = torch.nn.functional.silu(torch.tensor(gate)).item()
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-30)


def test_records_have_the_size_that_c_expects() -> None:
    source = Path(native.SOURCES[0]).read_text()
    assert "const char *codes[3]" in source and "int64_t first, tokens;" in source
    assert struct.calcsize("6Q2q") == 64


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("of_weights", DTYPES.values())
def test_sums_over_ranks_are_those_of_torch_bit_by_bit(
    dtype: torch.dtype, of_weights: torch.dtype
) -> None:
    torch.manual_seed(5)
    for tokens, k, width in ((1, 1, 64), (1, 4, 1024), (3, 8, 256), (40, 6, 64)):
        y, weights = torch.randn(tokens, k, width).to(dtype), torch.rand(tokens, k).to(of_weights)
        expected = (y * weights.unsqueeze(-1)).sum(dim=1).to(dtype)
        assert torch.equal(native.weighted_sum(y, weights), expected)


def test_a_sum_of_an_odd_width_goes_by_rank() -> None:
    y = torch.tensor([[[1e8] * 5, [1.0] * 5, [-1e8] * 5]])
    assert native.weighted_sum(y, torch.ones(1, 3)).tolist() == [[0.0] * 5]


# ---------------------------------------------------------------------------------- no compiler


def test_without_a_compiler_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    native._load.cache_clear()
    native.library.cache_clear()
    try:
        assert native.library() is None
        assert "no C compiler" in (native.why_not() or "")
        assert ExpertMlp(_Module(), native_rows=8).native_rows == 0
    finally:
        monkeypatch.undo()
        native._load.cache_clear()
        native.library.cache_clear()


def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\necho 'cc: error: out of coffee' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (native._load, native.library, native.identity):
        cached.cache_clear()
    try:
        assert native.library() is None
        assert "out of coffee" in (native.why_not() or "")
        assert not list(tmp_path.rglob("*.so"))
    finally:
        monkeypatch.undo()
        for cached in (native._load, native.library, native.identity):
            cached.cache_clear()
