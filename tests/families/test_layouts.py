"""Every expert, rebuilt from raw file bytes through its layout, is the parameter that transformers
loads: bit for bit, for every family of the installed transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from families import configs
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from understudy.checkpoint import Checkpoint
from understudy.core import ExpertLayout, Piece
from understudy.families import families

Change = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def piece(read: bytes, piece: Piece) -> torch.Tensor:
    """One piece, straight from the bytes of its read."""
    dtype = getattr(torch, piece.dtype)
    flat = torch.frombuffer(bytearray(read[piece.start :]), dtype=torch.uint8)
    flat = flat[: flat.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
    return flat.as_strided(piece.shape, piece.strides)


def rebuild(files: Sequence[Path], layout: ExpertLayout, axis: int) -> dict[str, torch.Tensor]:
    """All parameters of one expert from the files."""
    reads = []
    for file, offset, nbytes in layout.reads:
        with open(files[file], "rb") as f:
            f.seek(offset)
            reads.append(f.read(nbytes))
    rebuilt = {}
    for name, pieces in layout.params.items():
        parts = [piece(reads[p.read], p) for p in pieces]
        rebuilt[name] = torch.cat(parts, dim=axis if parts[0].ndim == 2 else 0)
    return rebuilt


def without_experts(loaded: PreTrainedModel) -> PreTrainedModel:
    """The model as the engine has it: on meta, expert parameters removed."""
    with torch.device("meta"):
        model = type(loaded)(loaded.config)
    for described, module in configs.experts_of(model):
        for param in described.params:
            delattr(module, param)
    return model


def check(family: str, folder: Path) -> None:
    """Compare every expert of a saved model with what transformers loads."""
    loaded = configs.load(family, folder)
    described = list(configs.experts_of(loaded))
    checkpoint = Checkpoint.open(folder)
    modules = [module for module, _ in described]
    layouts = checkpoint.layouts(without_experts(loaded), modules)

    assert len(layouts) == sum(module.num_experts for module in modules) > 0
    for module, owner in described:
        for expert in range(module.num_experts):
            layout = layouts[(module.layer, expert)]
            rebuilt = rebuild(checkpoint.files, layout, -1 if module.transposed else 0)
            assert rebuilt.keys() == module.params.keys() != set()
            for name, value in rebuilt.items():
                assert torch.equal(value, getattr(owner, name)[expert]), (module.name, name)
            assert layout.nbytes == sum(v.numel() * v.element_size() for v in rebuilt.values())


@pytest.mark.parametrize("family", sorted(families()))
def test_an_expert_is_its_bytes(family: str, tmp_path: Path) -> None:
    configs.build(family, tmp_path)
    check(family, tmp_path)


# Published checkpoints are not always what save_pretrained writes today.


def fused(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``experts.N.gate_proj.weight`` and so on as one ``gate_up_proj`` and one ``down_proj``."""
    kept = {k: v for k, v in tensors.items() if ".mlp.experts." not in k}
    stems = {k.partition(".mlp.experts.")[0] + ".mlp.experts." for k in tensors.keys() - kept}
    for stem in stems:
        gate, up, down = (
            torch.stack([tensors[f"{stem}{n}.{m}_proj.weight"] for n in range(configs.EXPERTS)])
            for m in ("gate", "up", "down")
        )
        kept |= {f"{stem}gate_up_proj": torch.cat([gate, up], dim=1), f"{stem}down_proj": down}
    return kept


def transposed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Expert matrices as ``[in, out]``."""
    return {
        name: t.transpose(1, 2).contiguous() if ".experts." in name and t.ndim == 3 else t
        for name, t in tensors.items()
    }


@pytest.mark.parametrize(
    ("family", "published"), [("qwen3_5_moe", fused), ("qwen3_vl_moe", transposed)]
)
def test_an_expert_is_its_bytes_as_published(
    family: str, published: Change, tmp_path: Path
) -> None:
    configs.build(family, tmp_path)
    file = tmp_path / "model.safetensors"
    before = load_file(file)
    after = published(before)
    assert {k: v.shape for k, v in before.items()} != {k: v.shape for k, v in after.items()}
    save_file(after, file, {"format": "pt"})
    check(family, tmp_path)
