"""The fast forward is the same model as transformers', and its gradients are autograd's."""

import pytest
import torch
from torch.nn import functional as F

from training import export, moe

SHAPES = [
    moe.Shape("qwen3_moe", layers=2, experts=8, top_k=2, width=24, hidden=32, heads=4,
              kv_heads=2, head_dim=16, vocabulary=97),
    moe.Shape("mixtral", layers=2, experts=4, top_k=2, width=48, hidden=32, heads=4,
              kv_heads=1, head_dim=8, vocabulary=97, eps=1e-5),
]  # fmt: skip


def _model(shape: moe.Shape) -> moe.Model:
    model = moe.Model(shape, dtype=torch.float32, compiled=False)
    with torch.no_grad():
        moe.initialize(shape, model.parameters.flat, seed=3)
        model.parameters.flat.mul_(4)  # away from the almost linear beginning
    return model


def _tokens(shape: moe.Shape) -> torch.Tensor:
    return torch.randint(shape.vocabulary, (3, 20), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.family)
def test_logits_agree_with_transformers(shape: moe.Shape) -> None:
    model = _model(shape)
    theirs = export.build(shape, model.parameters.weight, torch.float32)
    tokens = _tokens(shape)
    with torch.no_grad():
        expected = theirs(tokens).logits
        ours = model.logits(tokens)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.family)
def test_gradients_agree_with_transformers(shape: moe.Shape) -> None:
    model = _model(shape)
    theirs = export.build(shape, model.parameters.weight, torch.float32)
    tokens = _tokens(shape)
    inputs, target = tokens[:, :-1], tokens[:, 1:]
    F.cross_entropy(theirs(inputs).logits.flatten(0, 1), target.flatten()).backward()

    model.parameters.zero_grad()
    weight = torch.full(target.shape, 1 / target.numel())
    model.loss(inputs, target, weight).loss.backward()
    model.parameters.finish_grad()

    ours = export.state(shape, model.parameters.grad)
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        close = 1e-4 * float(parameter.grad.abs().max())
        torch.testing.assert_close(ours[name], parameter.grad, rtol=0, atol=close)


def test_every_choice_has_its_own_row_in_its_experts_span() -> None:
    ids = torch.randint(8, (50, 3), generator=torch.Generator().manual_seed(1))
    plan = moe.dispatch(ids, experts=8)
    assert len(plan.place.unique()) == ids.numel()
    for expert, (begin, end) in enumerate(plan.spans):
        assert (end - begin) % moe.ROUND == 0
        inside = (plan.place >= begin) & (plan.place < end)
        assert torch.equal(inside, ids == expert)
    assert torch.equal(plan.rows[plan.place], torch.arange(50)[:, None].expand(50, 3))
