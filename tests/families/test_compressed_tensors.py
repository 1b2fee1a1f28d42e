"""Experts as compressed-tensors packs them (int4 in groups, Kimi's way): read in place."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from families import configs
from safetensors.torch import load_file, save_file

import understudy
from understudy import formats
from understudy.anatomy import Anatomy
from understudy.checkpoint import Checkpoint
from understudy.core import QuantizedExperts

WEIGHTS = "model.safetensors"
WEIGHT_ARGS = {
    "num_bits": 4,
    "type": "int",
    "symmetric": True,
    "strategy": "group",
    "group_size": 32,
    "actorder": None,
}
QUANTISED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": ["lm_head", "re:.*self_attn.*"],
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": WEIGHT_ARGS, "input_activations": None}
    },
}
EXPERT = re.compile(r".*\.experts\.\d+\.(w[123]|(gate|up|down)_proj)\.weight")


def write(source: Path, folder: Path, which: re.Pattern[str] = EXPERT) -> dict[str, torch.Tensor]:
    """Quantise what ``which`` names; returns those weights as they come back."""
    for file in source.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    change(folder, QUANTISED)
    tensors, rounded = {}, {}
    ct = formats.get("ct-int4")
    for name, tensor in load_file(source / WEIGHTS).items():
        if not which.fullmatch(name):
            tensors[name] = tensor
            continue
        packed = ct.pack(tensor)
        tensors[f"{name}_packed"], tensors[f"{name}_scale"] = packed[""], packed["_scales"]
        tensors[f"{name}_shape"] = torch.tensor(tensor.shape)
        rounded[name] = ct.unpack(packed[""], packed["_scales"], torch.float32)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return rounded


def change(folder: Path, quantised: dict[str, Any]) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantised}))


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    ids = torch.randint(5, 120, (1, 9))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixtral")
    configs.build("mixtral", folder)
    return folder


def test_logits_are_those_of_the_unpacked_model(source: Path, tmp_path: Path) -> None:
    (tmp_path / "packed").mkdir()
    (tmp_path / "plain").mkdir()
    rounded = write(source, tmp_path / "packed")
    assert len(rounded) == configs.LAYERS * configs.EXPERTS * 3
    for file in source.glob("*.json"):
        (tmp_path / "plain" / file.name).write_bytes(file.read_bytes())
    whole = load_file(source / WEIGHTS) | rounded
    save_file(whole, tmp_path / "plain" / WEIGHTS, {"format": "pt"})
    expected = logits(configs.load("mixtral", tmp_path / "plain"))
    found = []
    for slots in (2, 5, 1000):
        with understudy.load(tmp_path / "packed", memory="1GiB", slots=slots) as model:
            found.append(logits(model))
            assert model.understudy.policies["format"] == "ct-int4"
            assert model.understudy.policies["lossy"] is False
    assert (found[0] - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert found[0].equal(found[1])
    assert found[0].equal(found[2])
    layouts = Anatomy.of(tmp_path / "packed").layouts.values()
    assert {len(layout.params["gate_up_proj"]) for layout in layouts} == {2}
    assert {len(layout.params["gate_up_proj_scales"]) for layout in layouts} == {2}


@pytest.mark.parametrize(
    ("args", "said"),
    [({"num_bits": 8}, "num_bits"), ({"symmetric": False}, "symmetric"),
     ({"actorder": "group"}, "actorder"), ({"strategy": "tensor"}, "strategy")],
)  # fmt: skip
def test_other_kinds_are_refused(
    source: Path, tmp_path: Path, args: dict[str, Any], said: str
) -> None:
    write(source, tmp_path)
    kind = {"targets": ["Linear"], "weights": WEIGHT_ARGS | args}
    change(tmp_path, QUANTISED | {"config_groups": {"group_0": kind}})
    with pytest.raises(QuantizedExperts, match=f"with another {said}"):
        Checkpoint.open(tmp_path)


def test_attention_may_be_quantised_too(source: Path, tmp_path: Path) -> None:
    """Dense codes are unpacked once, at load."""
    (tmp_path / "packed").mkdir()
    (tmp_path / "plain").mkdir()
    everything = re.compile(r".*(experts\.\d+\.w[123]|[qo]_proj)\.weight")
    rounded = write(source, tmp_path / "packed", everything)
    for file in source.glob("*.json"):
        (tmp_path / "plain" / file.name).write_bytes(file.read_bytes())
    whole = load_file(source / WEIGHTS) | rounded
    save_file(whole, tmp_path / "plain" / WEIGHTS, {"format": "pt"})
    expected = logits(configs.load("mixtral", tmp_path / "plain"))
    with understudy.load(tmp_path / "packed", memory="1GiB", slots=3) as model:
        found = logits(model)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
