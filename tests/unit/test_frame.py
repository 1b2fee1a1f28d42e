"""The compiled frame: the same numbers as eager mode but for rounding, the same bits everywhere."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import understudy
from understudy import frame, native
from understudy.core import UnderstudyError
from understudy.frame import kept, operators, program

FINE = Path(__file__).parents[2] / "models" / "fine"
PROMPT = torch.arange(5, 45).unsqueeze(0)


@pytest.fixture
def nothing_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, in which no layer is kept. Returns the folder where they will be."""
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path))
    return tmp_path / "layers"


def logits(memory: str, kind: str, **options: object) -> tuple[torch.Tensor, dict[str, object]]:
    """Logits of eight greedy steps, one row each."""
    with understudy.load(FINE, memory=memory, frame=kind, dtype="float32", **options) as model:
        out = model.generate(
            PROMPT, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        facts = dict(model.understudy.policies)
        facts["issued"] = model.understudy.counters.prefetch_issued
    return torch.cat(out.logits), facts


@pytest.mark.slow
def test_compiled_layers_answer_as_eager_ones_and_alike_under_every_budget() -> None:
    eager, _ = logits("100%", "eager", predictor="none")
    compiled, facts = logits("100%", "compiled", predictor="none")
    assert facts["frame"] == "10 layers compiled"
    assert (compiled - eager).abs().max() <= 1e-4 * eager.abs().max()
    small, facts = logits("40MiB", "compiled", predictor="next-gate", self_switch=False)
    assert torch.equal(small, compiled)
    # The routers of later layers are asked from inside compiled code, too.
    assert facts["lookahead_unavailable"] == {} and int(str(facts["issued"])) > 0


def test_small_models_are_left_eager_unless_asked() -> None:
    with understudy.load(FINE, memory="50%") as model:
        assert model.understudy.policies["frame"] == "eager"


def test_an_unknown_frame_is_refused() -> None:
    with pytest.raises(UnderstudyError, match="use auto, compiled or eager"):
        understudy.load(FINE, memory="50%", frame="jit")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_heads_in_groups_attend_as_heads_alone(dtype: torch.dtype, masked: bool) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 16).to(dtype) for h, n in ((6, 1), (2, 50), (2, 50)))
    mask = torch.rand(2, 1, 1, 50) > 0.3 if masked else None
    alone = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3, enable_gqa=True)
    grouped = operators._attend_by_groups(q, k, v, mask, 0.3)
    assert grouped.shape == (2, 1, 6, 16)
    assert torch.allclose(grouped, alone.transpose(1, 2), atol=1e-6 if not masked else 1e-2)


def test_a_cache_that_grows_in_place_holds_what_a_copied_one_holds() -> None:
    torch.manual_seed(0)
    steps = [torch.randn(1, 2, 1, 4) for _ in range(operators.ROOM + 5)]
    held = torch.randn(1, 2, 3, 4)
    expected, grown = held.clone(), held
    for new in steps:
        expected = torch.cat([expected, new], dim=2)
        grown = operators._grown(grown, new)
    assert torch.equal(grown, expected)


def test_a_cropped_cache_does_not_overwrite_what_others_still_see() -> None:
    first = operators._grown(torch.zeros(1, 1, 2, 1), torch.ones(1, 1, 1, 1))
    branch = first[:, :, :2]  # somebody takes a token back: another tensor, no room of its own
    other = operators._grown(branch, torch.full((1, 1, 1, 1), 7.0))
    assert first.flatten().tolist() == [0, 0, 1] and other.flatten().tolist() == [0, 0, 7]


@pytest.mark.slow
def test_layers_whose_steps_are_repeated_in_c_answer_as_the_compiled_function_does(
    nothing_kept: Path,
) -> None:
    with understudy.load(FINE, memory="100%", frame="compiled", dtype="bfloat16") as model:
        layers = [layer.forward for layer in model.model.layers]
        assert all(layer.code.program is not None for layer in layers), layers[0].code.why_not
        settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        by_steps = model.generate(PROMPT, **settings)
        for layer in layers:
            layer.code.program = None
        assert torch.equal(model.generate(PROMPT, **settings), by_steps)


@pytest.mark.slow
@pytest.mark.skipif(native.library() is None, reason=f"no kernel: {native.why_not()}")
def test_a_second_start_compiles_nothing_and_answers_alike(
    nothing_kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = logits("100%", "compiled")
    said: list[str] = []
    with monkeypatch.context() as no_compiler:
        no_compiler.setattr(frame, "compile_graph", None)
        second, facts = logits("100%", "compiled", on_status=said.append)
    assert facts["frame"] == "10 layers compiled"
    assert not any("compiling" in line for line in said)
    assert torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.skipif(native.library() is None, reason=f"no kernel: {native.why_not()}")
@pytest.mark.parametrize("damage", ["record", "loop", "other steps"])
def test_what_was_kept_and_is_damaged_is_compiled_again(nothing_kept: Path, damage: str) -> None:
    first, _ = logits("100%", "compiled")
    record, loop = next(nothing_kept.glob("*.json")), next(nothing_kept.glob("*.so"))
    before = record.read_bytes()
    if damage == "loop":
        loop.write_bytes(loop.read_bytes()[:-100])
    elif damage == "record":
        record.write_bytes(before[: len(before) // 2])
    else:  # whole, but of a layer that computes something else: its last step is gone
        notes = kept.find(record.stem)
        assert notes is not None
        kept.keep(record.stem, replace(notes, steps=notes.steps[:-1]))
    second, facts = logits("100%", "compiled")
    assert facts["frame"] == "10 layers compiled" and torch.equal(first, second)
    assert record.read_bytes() == before


@pytest.mark.slow
@pytest.mark.skipif(native.library() is None, reason=f"no kernel: {native.why_not()}")
def test_layers_that_cannot_be_kept_run_and_it_is_said(nothing_kept: Path) -> None:
    nothing_kept.write_text("a file where the folder should be")
    said: list[str] = []
    _, facts = logits("100%", "compiled", on_status=said.append)
    assert facts["frame"] == "10 layers compiled"
    assert any(str(nothing_kept) in line for line in said)


@pytest.mark.slow
def test_two_threads_in_the_same_layer_do_not_share_memory() -> None:
    with understudy.load(FINE, memory="100%", frame="compiled", dtype="float32") as model:
        settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        prompts = [PROMPT + i for i in range(4)]
        alone = [model.generate(p, **settings) for p in prompts]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda p: model.generate(p, **settings), prompts))
        assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


@pytest.mark.skipif(native.library() is None, reason=f"no kernel: {native.why_not()}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "width"), [(4, 2, 64), (6, 1, 16), (8, 8, 128)])
@pytest.mark.parametrize("tokens", [1, 2, 33, 700])
def test_attention_in_c(
    dtype: torch.dtype, heads: int, groups: int, width: int, tokens: int
) -> None:
    torch.manual_seed(tokens)
    q = torch.randn(1, heads, 1, width).to(dtype)
    room = [torch.full((1, groups, tokens + 3, width), torch.nan, dtype=dtype) for _ in range(2)]
    for held in room:
        held[:, :, :tokens] = torch.randn(1, groups, tokens, width).to(dtype)
    k, v = (held[:, :, tokens - 1 : tokens].clone() for held in room)
    expected = F.scaled_dot_product_attention(
        q.double(), *[held[:, :, :tokens].double() for held in room], scale=0.2, enable_gqa=True
    ).transpose(1, 2)
    for held in room:
        held[:, :, tokens - 1] = torch.nan  # the C code puts the new ones there itself
    found = []
    for threads in (1, 2):
        out = torch.empty(1, 1, heads, width, dtype=dtype)
        shape = native.Attention(heads, groups, width, tokens, tokens + 3, q.itemsize == 2, 0.2)
        strides = (ctypes.c_int64 * 3)(width, k.stride(1), v.stride(1))
        addresses = [t.data_ptr() for t in (q, k, v)]
        caches = [t.data_ptr() for t in (*room, out)]
        library = native.library()
        assert library is not None
        failed = library.understudy_attend(
            ctypes.addressof(shape), *addresses, strides, *caches, threads
        )
        assert not failed
        found.append(out)
    assert torch.equal(found[0], found[1])
    tolerance = 5e-6 if dtype == torch.float32 else 1e-2
    assert (found[0].float() - expected).abs().max() <= tolerance  # the numbers are about one
    assert torch.equal(room[0][:, :, tokens - 1 : tokens], k)


@pytest.mark.skipif(native.library() is None, reason=f"no kernel: {native.why_not()}")
def test_top_k_in_c() -> None:
    scores = torch.tensor([0.5, 2.0, -1.0, 2.0, torch.nan, 3.0])
    values, ids = torch.empty(4), torch.empty(4, dtype=torch.int64)
    spots = tuple(program.Spot(base, 0) for base in range(3))
    steps = [program.Native(native.TOPK, spots, (6, 4))]
    stretch = program._Stretch(steps, 3, {})
    bases = (ctypes.c_void_p * 3)(*[t.data_ptr() for t in (scores, values, ids)])
    library = native.library()
    assert library is not None
    library.understudy_steps(stretch.address, stretch.count, bases, 1)
    assert ids.tolist() == [4, 5, 1, 3] and values[1:].tolist() == [3.0, 2.0, 2.0]
