"""Checkpoints that are quantised all over, attention too: experts stay codes, the rest is unpacked.

FP8 in blocks as DeepSeek stores it; the reference is transformers with every weight dequantised.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import understudy
from understudy import formats
from understudy.checkpoint import Checkpoint
from understudy.core import CheckpointError, QuantizedExperts

WEIGHTS = "model.safetensors"
KEPT = ("embed_tokens", "lm_head", "norm", "mlp.gate.")  # what DeepSeek leaves in bf16
FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Experts of 256 x 128: several blocks, and gate and up each of whole ones."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=96, hidden_size=256, intermediate_size=64, moe_intermediate_size=128,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=40,
        num_experts=4, num_experts_per_tok=2, max_position_embeddings=64, initializer_range=0.1,
        bos_token_id=1, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain")
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.generation_config.max_length = 33
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def both(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The FP8 checkpoint, and the plain one with the weights that FP8 stands for."""
    folders = tuple(tmp_path_factory.mktemp(name) for name in ("fp8", "rounded"))
    fp8 = formats.get("fp8")
    tensors, rounded = {}, {}
    for name, tensor in load_file(plain / WEIGHTS).items():
        if any(word in name for word in KEPT):
            tensors[name] = rounded[name] = tensor
            continue
        packed = fp8.pack(tensor)
        tensors[name], tensors[f"{name}_scale_inv"] = packed[""], packed["_scales"]
        rounded[name] = fp8.unpack(packed[""], packed["_scales"], torch.float32)
    for folder, its in zip(folders, (tensors, rounded), strict=True):
        for file in plain.glob("*.json"):
            (folder / file.name).write_bytes(file.read_bytes())
        save_file(its, folder / WEIGHTS, {"format": "pt"})
    change(folders[0], FP8)
    return folders[0], folders[1]


def change(folder: Path, quantised: dict[str, Any]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantised}))


def copy(folder: Path, target: Path) -> Path:
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_it_computes_what_the_dequantised_model_computes(both: tuple[Path, Path]) -> None:
    stored, rounded = both
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        rounded, dtype=torch.float32, experts_implementation="eager"
    )
    ids = torch.arange(5, 16)[None]
    with torch.no_grad():
        expected = reference(input_ids=ids).logits
    found = []
    for slots in (2, 1000):
        with understudy.load(stored, memory="1GiB", slots=slots, dtype="float32") as model:
            found.append(model(input_ids=ids).logits)
            assert model.understudy.policies["format"] == "fp8"
            assert model.understudy.policies["lossy"] is False
            assert model.generation_config.max_length == 33
            held = sum(p.nbytes for p in model.parameters())
            assert understudy.inspect(stored).dense_bytes - held in range(4096)  # rotary
    assert (found[0] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert found[0].equal(found[1])


def test_missing_scales_are_named(both: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copy(both[0], tmp_path)
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.1.mlp.experts.2.up_proj.weight_scale_inv"]
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"experts\.2\.up_proj\.weight_scale_inv"):
        understudy.load(folder, memory="1GiB")


def test_scales_of_another_shape_are_named(both: tuple[Path, Path], tmp_path: Path) -> None:
    folder = copy(both[0], tmp_path)
    tensors = load_file(folder / WEIGHTS)
    tensors["model.layers.1.self_attn.o_proj.weight_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"o_proj\.weight_scale_inv is \[1, 1\] and should"):
        understudy.load(folder, memory="1GiB")


@pytest.mark.parametrize(
    "other", [{"weight_block_size": None}, {"weight_block_size": [1, 128]},
              {"activation_scheme": "static"}],
)  # fmt: skip
def test_other_blocks_are_refused(
    both: tuple[Path, Path], tmp_path: Path, other: dict[str, Any]
) -> None:
    folder = copy(both[0], tmp_path)
    change(folder, FP8 | other)
    with pytest.raises(QuantizedExperts, match="fp8 in blocks of"):
        Checkpoint.open(folder)
