"""Every expert, rebuilt from raw file bytes through its layout, is the parameter that transformers
loads: bit for bit, for every family of the installed transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from families import configs
from transformers import PreTrainedModel

from understudy.checkpoint import Checkpoint
from understudy.core import ExpertLayout, Piece
from understudy.families import families


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


@pytest.mark.parametrize("family", sorted(families()))
def test_an_expert_is_its_bytes(family: str, tmp_path: Path) -> None:
    configs.build(family, tmp_path)
    loaded = configs.load(family, tmp_path)
    described = list(configs.experts_of(loaded))
    checkpoint = Checkpoint.open(tmp_path)
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
