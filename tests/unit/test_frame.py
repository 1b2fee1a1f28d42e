"""The compiled frame: the same numbers as eager mode but for rounding, the same bits everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import understudy
from understudy import frame
from understudy.core import UnderstudyError

FINE = Path(__file__).parents[2] / "models" / "fine"
PROMPT = torch.arange(5, 45).unsqueeze(0)


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
    grouped = frame._attend_by_groups(q, k, v, mask, 0.3)
    assert grouped.shape == (2, 1, 6, 16)
    assert torch.allclose(grouped, alone.transpose(1, 2), atol=1e-6 if not masked else 1e-2)


def test_a_cache_that_grows_in_place_holds_what_a_copied_one_holds() -> None:
    torch.manual_seed(0)
    steps = [torch.randn(1, 2, 1, 4) for _ in range(frame.ROOM + 5)]
    held = torch.randn(1, 2, 3, 4)
    expected, grown = held.clone(), held
    for new in steps:
        expected = torch.cat([expected, new], dim=2)
        grown = frame._grown(grown, new)
    assert torch.equal(grown, expected)


def test_a_cropped_cache_does_not_overwrite_what_others_still_see() -> None:
    first = frame._grown(torch.zeros(1, 1, 2, 1), torch.ones(1, 1, 1, 1))
    branch = first[:, :, :2]  # somebody takes a token back: another tensor, no room of its own
    other = frame._grown(branch, torch.full((1, 1, 1, 1), 7.0))
    assert first.flatten().tolist() == [0, 0, 1] and other.flatten().tolist() == [0, 0, 7]
