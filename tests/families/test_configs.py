"""The tiny models are worth comparing with: small, with experts, and transformers runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import configs

from understudy.families import WITHOUT_INTERFACE, experts_classes, families, support


@pytest.mark.parametrize("family", sorted(families()))
def test_plain_transformers_runs_the_tiny_model(family: str, tmp_path: Path) -> None:
    model = configs.build(family, tmp_path)
    used = set()
    for module, owner in configs.experts_of(model):
        owner.register_forward_hook(lambda *_, layer=module.layer: used.add(layer))
    with torch.no_grad():
        out = model(**configs.inputs(family, model))

    assert torch.isfinite(out[0]).all()
    assert len(used) >= 2, "the seam is called in at least two layers"
    assert sum(p.numel() for p in model.parameters()) < 2_500_000


def test_a_family_is_found_by_its_decorator() -> None:
    assert families()["mixtral"].experts_classes == ("MixtralExperts",)
    assert len(families()["qwen3_omni_moe"].experts_classes) == 2
    assert experts_classes()["Qwen3MoeExperts"].endswith("qwen3_moe.modeling_qwen3_moe")
    assert "llama" not in families()


def test_every_name_says_whether_it_runs_and_why() -> None:
    table = support()
    assert families().keys() <= table.keys()
    assert table["mixtral"].supported
    assert not any(table[name].supported for name in WITHOUT_INTERFACE)
    assert all(entry.reason for entry in table.values())
