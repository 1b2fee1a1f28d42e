"""What later routers are asked about is what each foresight says, on models of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from families import configs

from understudy import model as guest
from understudy.core import Forward, LayerEvent, Phase
from understudy.engine import load
from understudy.experts.estimator import Estimator
from understudy.experts.foresight import (
    Estimated,
    Foresight,
    NotForeseen,
    Quasi,
    Residual,
    make,
)
from understudy.experts.runtime import Seen

SHARED = ("qwen2_moe", "deepseek_v3")


@contextmanager
def watched(folder: Path) -> Iterator[tuple[Any, list[Seen]]]:
    """A loaded model that shows its residual stream, and what was seen of its forwards."""
    seen: list[Seen] = []
    with load(folder, slots=6, dtype="float32", predictor="none", frame="eager") as model:
        handle = model.understudy
        guest.watch_residuals(model, handle.anatomy.modules)
        handle.runtime.watch = lambda s: seen.append(kept(s))
        yield model, seen


def kept(s: Seen) -> Seen:
    """As it is now: a forward keeps the arguments of the last router only."""
    assert s.forward is not None
    forward = Forward(
        s.forward.step, s.forward.phase,
        router_args=dict(s.forward.router_args), residuals=dict(s.forward.residuals),
    )  # fmt: skip
    return Seen(s.event, forward, s.x.clone(), s.out.clone())


def norms(seen: list[Seen]) -> dict[int, torch.nn.Module]:
    return {s.event.layer: s.forward.residuals[s.event.layer][0] for s in seen if s.forward}


def input_of(s: Seen) -> torch.Tensor:
    assert s.forward is not None
    x: torch.Tensor = s.forward.router_args[s.event.layer][0][0]
    return x.reshape(-1, x.shape[-1])


def saved(model: Any, folder: Path, *, attention: bool) -> Path:
    """The same checkpoint, every norm another; without ``attention`` that adds nothing to the
    residual stream."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.mul_(0.5 + torch.rand_like(parameter))
            if ".o_proj." in name and not attention:
                parameter.zero_()
    model.save_pretrained(folder)
    return folder


def true_outputs(s: Seen, layers: int, experts: int) -> torch.Tensor:
    """[L, E, H] of one token: what its experts put out, where `Quasi` has their means."""
    vectors = torch.full((layers, experts, s.out.shape[-1]), torch.nan)
    for rank, expert in enumerate(s.event.ids[0]):
        vectors[s.event.layer, expert] = s.out[0, rank]
    return vectors


# ------------------------------------------------------------------------- against transformers


def test_drift_is_the_next_norm_of_the_residual_stream(
    tiny: Callable[..., Path], tokens: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    batch, plain = tokens(9), AutoModelForCausalLM.from_pretrained(tiny("qwen3_moe")).eval()
    folder = saved(plain, tmp_path, attention=True)
    residuals: list[torch.Tensor] = []
    for layer in plain.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda m, args: residuals.append(args[0][0])
        )
    with torch.no_grad(), watched(folder) as (model, seen):
        plain(**batch)
        model(**batch)
        foresight = Foresight()
        foresight.norms = norms(seen)
        for s in seen[:-1]:
            layer = s.event.layer
            asked = foresight.router_input(s.forward, layer, layer + 1, s.event)  # type: ignore[arg-type]
            norm = plain.model.layers[layer + 1].post_attention_layernorm
            expected = norm(residuals[layer])
            torch.testing.assert_close(asked, expected, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(asked, input_of(s), atol=1e-3)  # another norm than its own


@pytest.mark.parametrize("token", [5, 17, 60])
def test_quasi_with_true_outputs_is_the_next_router_input_without_attention(
    tiny: Callable[..., Path], tmp_path: Path, token: int
) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny("qwen3_moe"))
    with torch.no_grad(), watched(saved(plain, tmp_path, attention=False)) as (model, seen):
        model(input_ids=torch.tensor([[token]]))
        assert len(seen) == 4
        for now, later in pairwise(seen):
            layer = now.event.layer
            quasi = Quasi(true_outputs(now, 4, 8))
            quasi.norms = norms(seen)
            asked = quasi.router_input(now.forward, layer, layer + 1, now.event)  # type: ignore[arg-type]
            torch.testing.assert_close(asked, input_of(later), rtol=1e-5, atol=1e-6)
            drift = Foresight()
            drift.norms = norms(seen)
            blind = drift.router_input(now.forward, layer, layer + 1, now.event)  # type: ignore[arg-type]
            assert not torch.allclose(blind, input_of(later), atol=1e-2)


@pytest.mark.parametrize("family", SHARED)
def test_shared_adds_what_the_shared_experts_put_out(family: str, tmp_path: Path) -> None:
    plain = configs.build(family, tmp_path / "whole")
    folder = saved(plain, tmp_path / "quiet", attention=False)
    with torch.no_grad(), watched(folder) as (model, seen):
        model(input_ids=torch.tensor([[9]]))
        modules = model.understudy.anatomy.modules
        shared = guest.shared_experts(model, modules)
        assert len(seen) >= 2 and all(shared)
        for now, later in pairwise(seen):
            layer, vectors = now.event.layer, true_outputs(now, len(modules), configs.EXPERTS)
            with_shared, without = Quasi(vectors, shared), Quasi(vectors)
            with_shared.norms = without.norms = norms(seen)
            asked = with_shared.router_input(now.forward, layer, layer + 1, now.event)  # type: ignore[arg-type]
            torch.testing.assert_close(asked, input_of(later), rtol=1e-5, atol=1e-6)
            poorer = without.router_input(now.forward, layer, layer + 1, now.event)  # type: ignore[arg-type]
            assert not torch.allclose(poorer, input_of(later), atol=1e-2)


# -------------------------------------------------------------------------------------- by hand


class Double(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


R = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
S = torch.tensor([[[5.0, 6.0], [7.0, 8.0]]])
EVENT = LayerEvent(0, 0, Phase.PREFILL, [[0, 2], [1, -1]], [[0.5, 0.25], [1.0, 0.0]])


def forward() -> Forward:
    return Forward(
        0, Phase.PREFILL, router_args={0: ((S,), {})}, residuals={0: (Double(), R[None])}
    )


def knowing(foresight: Foresight) -> Foresight:
    foresight.norms[1] = Double()
    return foresight


def test_residual_adds_every_change_on_the_way() -> None:
    changes = torch.tensor([[1.0, 0.0], [0.0, 10.0], [0.0, 0.0]])
    foresight = Residual(changes)
    assert not foresight.needs_residual
    near, far = (foresight.router_input(forward(), 0, later, EVENT) for later in (1, 2))
    assert torch.equal(near, S + torch.tensor([1.0, 0.0]))
    assert torch.equal(far, S + torch.tensor([1.0, 10.0]))


def test_quasi_adds_weighted_vectors_and_nothing_for_nobody() -> None:
    vectors = torch.tensor([[[4.0, 0.0], [0.0, 3.0], [8.0, 8.0]]])
    asked = knowing(Quasi(vectors)).router_input(forward(), 0, 1, EVENT)
    # 2 ([1, 0] + 0.5 [4, 0] + 0.25 [8, 8]) and 2 ([0, 1] + [0, 3])
    assert torch.equal(asked, torch.tensor([[10.0, 4.0], [0.0, 8.0]]))


def test_what_cannot_be_foreseen_is_said() -> None:
    vectors = torch.zeros(2, 3, 2)
    with pytest.raises(NotForeseen, match="norm has not been seen"):
        Quasi(vectors).router_input(forward(), 0, 1, EVENT)
    with pytest.raises(NotForeseen, match="residual stream is not visible"):
        knowing(Foresight()).router_input(forward(), 1, 1, EVENT)
    with pytest.raises(NotForeseen, match="padding"):
        one = LayerEvent(0, 0, Phase.DECODE, [[0, 2]], [[0.5, 0.5]])
        knowing(Quasi(vectors)).router_input(forward(), 0, 1, one)
    with pytest.raises(NotForeseen, match="narrower"):
        knowing(Quasi(torch.zeros(2, 3, 1))).router_input(forward(), 0, 1, EVENT)
    with pytest.raises(NotForeseen, match="no shared experts"):
        knowing(Quasi(vectors, [None, None])).router_input(forward(), 0, 1, EVENT)


class Learned:
    """A profile of three layers whose estimator is better in the last."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network = Estimator(hidden=6, experts=5, layers=3, width=4, expansion=2)
        self.tensors = self.network.tensors() | {
            "default_vectors": torch.randn(3, 5, 6),
            "residual_vectors": torch.randn(3, 6),
            "estimator_better": torch.tensor([0, 0, 1]),
        }

    def tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name]


def test_the_estimator_comes_out_of_the_profile_as_it_went_in() -> None:
    known, x = Learned(), torch.randn(7, 6)
    everywhere, somewhere = (make(name, known, ()) for name in ("estimator", "hybrid"))
    assert isinstance(everywhere, Estimated) and isinstance(somewhere, Estimated)
    for later in (1, 2):
        found = everywhere.logits(later, x)
        assert found is not None and torch.equal(found, known.network(x, later))
    assert somewhere.logits(1, x) is None
    assert torch.equal(somewhere.logits(2, x), known.network(x, 2))  # type: ignore[arg-type]
    weights = sum(p.nbytes for p in known.network.parameters())
    assert somewhere.nbytes == weights + 4 * 3 * 5 * 6


def test_one_network_serves_rows_of_several_layers() -> None:
    network, x = Learned().network, torch.randn(2, 6)
    mixed = network(x, torch.tensor([2, 1]))
    torch.testing.assert_close(mixed[0], network(x[:1], 2)[0])
    torch.testing.assert_close(mixed[1], network(x[1:], 1)[0])
    assert not torch.allclose(network(x, 1), network(x, 2))
