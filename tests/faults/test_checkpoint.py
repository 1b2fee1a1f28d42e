"""A checkpoint that cannot be run is refused in one line that names the cure.

Files are made by hand, byte by byte: headers are never trusted.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import configs
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from understudy.checkpoint import Checkpoint, ExpertsModule
from understudy.checkpoint.files import HEADER_LIMIT, read_header
from understudy.core import CheckpointError, QuantizedExperts, UnsupportedFamily

FAMILY = "qwen3_moe"
WEIGHTS = "model.safetensors"
GATE = "model.layers.1.mlp.experts.2.gate_proj.weight"


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    configs.build(FAMILY, folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A checkpoint of one's own to damage."""
    return Path(shutil.copytree(whole, tmp_path / "checkpoint"))


def refusal(kind: type[Exception], action: Callable[..., Any], *args: Any) -> str:
    with pytest.raises(kind) as caught:
        action(*args)
    text = str(caught.value)
    assert "\n" not in text
    return text


def layouts(folder: Path) -> Any:
    """As the engine does it: the model comes from config.json alone."""
    found = configs.tiny(FAMILY)
    checkpoint = Checkpoint.open(folder)
    with torch.device("meta"):
        model = found.model_class(checkpoint.config)
    modules = [module for module, _ in configs.experts_of(model)]
    return checkpoint.layouts(model, modules)


def write(file: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    file.write_bytes(struct.pack("<Q", size) + text + data)
    return file


def entry(dtype: str, shape: list[Any], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_nothing_is_wrong_with_the_whole_one(folder: Path) -> None:
    assert len(layouts(folder)) == configs.LAYERS * configs.EXPERTS


# ------------------------------------------------------------------------------------- not there


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/folder", "~/no such folder"])
def test_no_such_path(source: str) -> None:
    assert "give a checkpoint folder, or a hub id" in refusal(
        CheckpointError, Checkpoint.open, source
    )


def test_a_file_is_not_a_folder(folder: Path) -> None:
    text = refusal(CheckpointError, Checkpoint.open, folder / WEIGHTS)
    assert f"give the folder it is in, {folder}" in text


def test_a_hub_id_offline(folder: Path, tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--here--model"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, repo / "snapshots" / ("0" * 40))
    code = """
from understudy.checkpoint import Checkpoint
print(len(Checkpoint.open("here/model").tensors))
try: Checkpoint.open("not-here/model")
except Exception as e: print(type(e).__name__, e)
"""
    env = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}  # read once per process
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    found, missing = run.stdout.splitlines()
    assert found == str(len(Checkpoint.open(folder).tensors))
    assert missing.startswith("CheckpointError cannot get 'not-here/model'")
    assert "not in the local cache" in missing
    assert "HF_HUB_OFFLINE" in missing


def test_a_path_nobody_can_have() -> None:
    assert "give another path" in refusal(CheckpointError, Checkpoint.open, "./" + "x" * 5000)


# ------------------------------------------------------------------------------ not what we run


def test_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(CheckpointError, Checkpoint.open, folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", "[" * 100_000, "\udcff"])
def test_config_is_garbage(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert "download it again" in refusal(CheckpointError, Checkpoint.open, folder)


def test_a_model_type_from_the_future(folder: Path) -> None:
    edit_config(folder, model_type="qwen17_moe")
    assert "newer transformers" in refusal(UnsupportedFamily, Checkpoint.open, folder)


def test_a_config_its_family_refuses(folder: Path) -> None:
    edit_config(folder, num_hidden_layers="three")
    assert "mend config.json" in refusal(CheckpointError, Checkpoint.open, folder)


def test_not_a_mixture_of_experts(folder: Path) -> None:
    model = configs.load(FAMILY, folder)
    text = refusal(CheckpointError, Checkpoint.open(folder).layouts, model, [])
    assert "not a Mixture-of-Experts" in text


def test_only_pickled_weights(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    text = refusal(CheckpointError, Checkpoint.open, folder)
    assert "pickle can run any code" in text
    assert "save_pretrained" in text


def test_no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    assert "safetensors format" in refusal(CheckpointError, Checkpoint.open, folder)


@pytest.mark.parametrize("method", ["awq", "fp8", "gptq"])
def test_quantised_by_config(folder: Path, method: str) -> None:
    edit_config(folder, quantization_config={"quant_method": method})
    text = refusal(QuantizedExperts, Checkpoint.open, folder)
    assert f"quantised ({method}" in text
    assert "bf16" in text


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (torch.float8_e4m3fn, "FP8"),
        (torch.uint8, "MXFP4"),
        (torch.int8, "integers (I8)"),
        (torch.int32, "int4"),
    ],
)
def test_quantised_by_dtype(folder: Path, dtype: torch.dtype, said: str) -> None:
    rewrite(folder, lambda t: t.update({GATE: t[GATE].to(dtype)}))
    text = refusal(QuantizedExperts, layouts, folder)
    assert said in text
    assert GATE in text


# ---------------------------------------------------------------------------------- shards


def in_shards(folder: Path) -> list[str]:
    """Cut the one file in two, with an index; returns their names."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = ["a.safetensors", "b.safetensors"]
    index = {name: names[i % 2] for i, name in enumerate(tensors)}
    for file in names:
        save_file({k: v for k, v in tensors.items() if index[k] == file}, folder / file)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": index}))
    return names


def test_two_shards_are_fine(folder: Path) -> None:
    in_shards(folder)
    assert len(Checkpoint.open(folder).files) == 2
    assert layouts(folder)


def test_missing_shard(folder: Path) -> None:
    (folder / in_shards(folder)[1]).unlink()
    text = refusal(CheckpointError, Checkpoint.open, folder)
    assert "missing shard" in text
    assert "b.safetensors" in text


def test_the_index_promises_too_much(folder: Path) -> None:
    in_shards(folder)
    index = json.loads((folder / f"{WEIGHTS}.index.json").read_text())
    index["weight_map"]["ghost"] = "a.safetensors"
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert "'ghost'" in refusal(CheckpointError, Checkpoint.open, folder)


@pytest.mark.parametrize("shard", ["../x.safetensors", "/etc/x.safetensors", 7])
def test_a_shard_outside_the_folder(folder: Path, shard: Any) -> None:
    in_shards(folder)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"x": shard}}))
    assert "outside its own folder" in refusal(CheckpointError, Checkpoint.open, folder)


@pytest.mark.parametrize("index", [[], {}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_without_a_map(folder: Path, index: Any) -> None:
    in_shards(folder)
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    assert "weight_map" in refusal(CheckpointError, Checkpoint.open, folder)


def test_truncated_shard(folder: Path) -> None:
    size = (folder / WEIGHTS).stat().st_size
    os.truncate(folder / WEIGHTS, size - 1)
    text = refusal(CheckpointError, Checkpoint.open, folder)
    assert "truncated" in text
    assert str(size - 1) in text


# ---------------------------------------------------------------------------------- headers


@pytest.mark.parametrize("size", [0, 3, 7])
def test_a_file_too_short_for_a_length(tmp_path: Path, size: int) -> None:
    (tmp_path / "x").write_bytes(b"\x01" * size)
    assert "truncated" in refusal(CheckpointError, read_header, tmp_path / "x")


@pytest.mark.parametrize("length", [3, 1000, HEADER_LIMIT, HEADER_LIMIT + 1, 2**64 - 1])
def test_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
    file = write(tmp_path / "x", b"{}", length=length)
    assert "download it again" in refusal(CheckpointError, read_header, file)


@pytest.mark.parametrize("text", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000, b'{"a":NaN,}'])
def test_header_is_not_json(tmp_path: Path, text: bytes) -> None:
    assert "damaged" in refusal(CheckpointError, read_header, write(tmp_path / "x", text))


@pytest.mark.parametrize(
    "bad",
    [
        None,
        7,
        {},
        {"dtype": "F32", "shape": [2]},
        entry("F32", [2.0], 0, 8),
        entry("F32", [True, 2], 0, 8),
        entry("F32", [-2, -1], 0, 8),
        entry("F32", ["2"], 0, 8),
        entry("F32", [2], -8, 0),
        entry("F32", [10**4000], 0, 8),
        entry("F32", [1] * 1000, 0, 4),
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 16]},
        {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]},
    ],
)
def test_malformed_entry(tmp_path: Path, bad: Any) -> None:
    file = write(tmp_path / "x", {"t": bad}, bytes(8))
    assert "malformed" in refusal(CheckpointError, read_header, file)


@pytest.mark.parametrize("dtype", ["F99", "f32", "", 5, None, ["F32"]])
def test_unknown_dtype(tmp_path: Path, dtype: Any) -> None:
    file = write(tmp_path / "x", {"t": entry(dtype, [2], 0, 8)}, bytes(8))
    assert "unknown dtype" in refusal(CheckpointError, read_header, file)


@pytest.mark.parametrize(
    "bad",
    [entry("F32", [2], 0, 4), entry("BF16", [3], 0, 8), entry("F32", [10**18, 10**18], 0, 8)],
)
def test_shape_and_bytes_disagree(tmp_path: Path, bad: Any) -> None:
    file = write(tmp_path / "x", {"t": bad}, bytes(8))
    assert "but has" in refusal(CheckpointError, read_header, file)


def test_backward_range(tmp_path: Path) -> None:
    file = write(tmp_path / "x", {"t": entry("F32", [2], 8, 0)}, bytes(8))
    assert "but has -8 bytes" in refusal(CheckpointError, read_header, file)


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [((0, 8), (4, 12), "overlaps"), ((0, 8), (0, 8), "overlaps"), ((0, 8), (12, 20), "a gap")],
)
def test_tensors_must_tile(tmp_path: Path, a: Any, b: Any, said: str) -> None:
    header = {"a": entry("F32", [2], *a), "b": entry("F32", [2], *b)}
    file = write(tmp_path / "x", header, bytes(max(b)))
    assert said in refusal(CheckpointError, read_header, file)


def test_range_outside_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "x", {"t": entry("U8", [10**15], 0, 10**15)}, bytes(8))
    assert "the file ends at" in refusal(CheckpointError, read_header, file)


def test_bytes_behind_the_last_tensor(tmp_path: Path) -> None:
    file = write(tmp_path / "x", {"t": entry("F32", [2], 0, 8)}, bytes(9))
    assert "1 bytes behind" in refusal(CheckpointError, read_header, file)


def test_metadata_and_empty_tensors_are_fine(tmp_path: Path) -> None:
    header = {"__metadata__": {"a": "b"}, "e": entry("F32", [0, 3], 0, 0)}
    assert [t.name for t in read_header(write(tmp_path / "x", header))] == ["e"]


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, 700), put=st.binary(min_size=1, max_size=9))
def test_no_damage_to_a_header_goes_unnamed(
    at: int, put: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever is overwritten: a clean refusal, or tensors that lie inside the file."""
    file = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    save_file({f"tensor.{i}": torch.zeros(4, i) for i in range(8)}, file)
    raw = bytearray(file.read_bytes())
    raw[at : at + len(put)] = put
    file.write_bytes(raw)
    try:
        found = read_header(file)
    except CheckpointError as e:
        assert len(str(e).splitlines()) == 1
    else:
        assert all(t.offset + t.nbytes <= len(raw) for t in found)


# ---------------------------------------------------------------------------------- experts


@pytest.mark.parametrize("expert", [0, 2, configs.EXPERTS - 1])
def test_missing_expert(folder: Path, expert: int) -> None:
    name = GATE.replace(".2.", f".{expert}.")
    rewrite(folder, lambda t: t.pop(name))
    text = refusal(CheckpointError, layouts, folder)
    assert text == f"expert tensor {name!r} is missing from the checkpoint: download it again"


def test_missing_matrix(folder: Path) -> None:
    rewrite(folder, lambda t: [t.pop(k) for k in list(t) if k.endswith("1.mlp.experts.0.up_proj")])
    rewrite(folder, lambda t: [t.pop(k) for k in list(t) if "layers.1" in k and ".up_proj" in k])
    assert "up_proj" in refusal(CheckpointError, layouts, folder)


def test_missing_layer(folder: Path) -> None:
    rewrite(folder, lambda t: [t.pop(k) for k in list(t) if "layers.1.mlp.experts" in k])
    text = refusal(CheckpointError, layouts, folder)
    assert "'model.layers.1.mlp.experts." in text
    assert "missing" in text


def test_one_expert_of_another_shape(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({GATE: torch.zeros(8, 64)}))
    text = refusal(CheckpointError, layouts, folder)
    assert "stack of different shapes [(8, 64), (48, 64)]" in text


def test_all_experts_of_another_shape(folder: Path) -> None:
    edit_config(folder, moe_intermediate_size=32)
    text = refusal(CheckpointError, layouts, folder)
    assert "[4, 96, 64] in the checkpoint but config.json makes it [4, 64, 64]" in text


def test_more_experts_than_there_are(folder: Path) -> None:
    edit_config(folder, num_experts=6, num_local_experts=6)
    assert "experts.4." in refusal(CheckpointError, layouts, folder)


def test_misaligned_experts(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    shifted = struct.pack("<Q", length + 1) + raw[8 : 8 + length] + b" " + raw[8 + length :]
    (folder / WEIGHTS).write_bytes(shifted)
    assert "not a multiple of its 4-byte elements" in refusal(CheckpointError, layouts, folder)


def test_an_operation_that_is_not_a_view(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import core_model_loading

    def flipped(self: Any, input_dict: Any, **_: Any) -> Any:
        return {k: torch.flip(v[0], dims=[0]) for k, v in input_dict.items()}

    monkeypatch.setattr(core_model_loading.MergeModulelist, "convert", flipped)
    text = refusal(UnsupportedFamily, layouts, folder)
    assert "qwen3_moe" in text
    assert "MergeModulelist" in text
    assert "torch.flip" in text


def test_a_parameter_that_is_no_expert(folder: Path) -> None:
    module = ExpertsModule("model.embed_tokens", 0, 8, {"weight": (8, 16, 64)})
    model = configs.load(FAMILY, folder)
    text = refusal(CheckpointError, Checkpoint.open(folder).layouts, model, [module])
    assert "[128, 64] in the checkpoint but config.json makes it [8, 16, 64]" in text


def test_an_expert_scattered_over_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The expert axis lies innermost: to read one expert would be to read them all."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import Transpose, WeightConverter

    name = "embed_tokens.weight"
    rule = WeightConverter([name], [name], operations=[Transpose(0, 1)])
    monkeypatch.setattr(conversion_mapping, "get_model_conversion_mapping", lambda _: [rule])
    module = ExpertsModule("model.embed_tokens", 0, 64, {"weight": (64, 128)})
    model = configs.load(FAMILY, folder)
    text = refusal(UnsupportedFamily, Checkpoint.open(folder).layouts, model, [module])
    assert "lies scattered" in text
