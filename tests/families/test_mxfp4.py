"""gpt-oss as people download it, experts in MXFP4: read in place, computed as stored.

The reference is transformers' own model with its experts dequantised by transformers' own code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import configs
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import understudy
from understudy import formats
from understudy.anatomy import Anatomy
from understudy.checkpoint import Checkpoint
from understudy.core import CheckpointError, QuantizedExperts

FAMILY = "gpt_oss"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpt-oss")
    configs.build(FAMILY, folder)
    return folder


@pytest.fixture(scope="module")
def stored(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as an MXFP4 checkpoint, names and shapes those of openai/gpt-oss-20b."""
    folder = tmp_path_factory.mktemp("gpt-oss-mxfp4")
    for file in plain.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = {}
    for name, tensor in load_file(plain / WEIGHTS).items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensor
            continue
        packed = [formats.get("mxfp4").pack(matrix.T) for matrix in tensor]  # lies [in, out]
        blocks = torch.stack([p[""] for p in packed])
        tensors[f"{name}_blocks"] = blocks.unflatten(2, (-1, 16)).contiguous()
        tensors[f"{name}_scales"] = torch.stack([p["_scales"] for p in packed])
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    edit(folder, quantization_config={
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    })  # fmt: skip
    return folder


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.fixture(scope="module")
def reference(plain: Path, stored: Path) -> Any:
    """transformers, everything resident, experts dequantised by `convert_moe_packed_tensors`."""
    model = configs.load(FAMILY, plain)
    tensors = load_file(stored / WEIGHTS)
    for module, real in configs.experts_of(model):
        for name in ("gate_up_proj", "down_proj"):
            parts = [tensors[f"{module.name}.{name}_{part}"] for part in ("blocks", "scales")]
            weights = convert_moe_packed_tensors(*parts, dtype=torch.float32)
            getattr(real, name).data.copy_(weights)
    return model


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    ids = torch.randint(5, 120, (1, 9))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def test_logits_are_those_of_transformers_in_every_budget(stored: Path, reference: Any) -> None:
    expected = logits(reference)
    found = []
    for slots in (2, 5, 1000):
        with understudy.load(stored, memory="1GiB", slots=slots, dtype="float32") as model:
            found.append(logits(model))
            assert model.understudy.policies["format"] == "mxfp4"
            assert model.understudy.policies["lossy"] is False
            assert "experts in mxfp4, as stored" in model.understudy.plan.line()
    assert (found[0] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert found[0].equal(found[1])
    assert found[0].equal(found[2])


def test_greedy_text_is_that_of_transformers(stored: Path, reference: Any) -> None:
    ids = torch.arange(5, 12)[None]
    more: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    with understudy.load(stored, memory="1GiB", slots=3, dtype="float32") as model:
        assert model.generate(ids, **more).equal(reference.generate(ids, **more))


def test_nothing_but_the_stored_bytes_is_read(stored: Path) -> None:
    """Codes, scales and biases of one expert, and nothing of its neighbours."""
    anatomy = Anatomy.of(stored)
    module = anatomy.modules[0]
    _, inner, out = module.params["gate_up_proj"]
    _, width, hidden = module.params["down_proj"]
    by_hand = out * inner * 17 // 32 + hidden * width * 17 // 32 + 4 * (out + hidden)
    for layout in anatomy.layouts.values():
        assert layout.format == "mxfp4"
        assert layout.nbytes == by_hand
        (codes,), (scales,) = layout.params["gate_up_proj"], layout.params["gate_up_proj_scales"]
        assert (codes.dtype, codes.shape) == ("uint8", (out, inner // 2))
        assert (scales.dtype, scales.shape) == ("uint8", (out, inner // 32))
    assert anatomy.dense_bytes(torch.float32) == Anatomy.of(stored).dense_bytes(torch.float32)


def test_the_dense_part_is_that_of_the_plain_checkpoint(plain: Path, stored: Path) -> None:
    before, after = understudy.inspect(plain), understudy.inspect(stored)
    assert after.dense_bytes == before.dense_bytes
    assert (after.format, after.lossy, after.delta_nll) == ("mxfp4", False, None)
    assert after.expert_bytes < before.expert_bytes / 6
    assert not hasattr(Checkpoint.open(stored).config, "quantization_config")


def test_missing_scales_are_named(stored: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((stored / "config.json").read_bytes())
    tensors = load_file(stored / WEIGHTS)
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(tensors, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.down_proj_scales"):
        understudy.load(tmp_path, memory="1GiB")


def test_other_methods_are_refused_by_name_and_say_what_runs(stored: Path, tmp_path: Path) -> None:
    for file in stored.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit(tmp_path, quantization_config={"quant_method": "awq"})
    with pytest.raises(QuantizedExperts, match=r"quantised \(awq\).*MXFP4 \(gpt-oss\).* run"):
        understudy.load(tmp_path, memory="1GiB")
