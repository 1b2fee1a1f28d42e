"""Addresses behave like tensors, and layouts say where an expert lies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import configs
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from understudy.checkpoint import Checkpoint, ExpertsModule
from understudy.checkpoint.strided import Joined, NotAView, Strided, View, views, views_along
from understudy.core import ExpertId, ExpertLayout


def address(start: int, *shape: int) -> View:
    """Elements of one byte, so that an address is an element number."""
    return View.whole(0, start, 1, "uint8", shape)


def elements(tensor: Strided) -> torch.Tensor:
    """Which byte each element of a tensor is."""
    if isinstance(tensor, Joined):
        return torch.cat([elements(part) for part in tensor.parts], dim=tensor.axis)
    assert isinstance(tensor, View)
    line = torch.arange(1000)[tensor.start :]
    return line.as_strided(tensor.shape, tensor.strides)


# ------------------------------------------------------------------------- addresses like tensors


def stacked(t: Any) -> Any:
    return torch.stack([t, t], dim=1)


def doubled(t: Any) -> Any:
    return torch.cat([t, t], dim=t.ndim - 1)


def interleaved(t: Any) -> Any:
    """What transformers' Interleave does."""
    shape = list(t.shape)
    split = [shape[0] // 2, 2, *shape[1:]]
    return t.reshape(split).transpose(0, 1).reshape(shape).contiguous()


CHANGES = [
    stacked,
    doubled,
    interleaved,
    lambda t: torch.transpose(t, dim0=0, dim1=1),
    lambda t: t.transpose(-1, -2),
    lambda t: torch.chunk(t, 2, dim=0)[1],
    lambda t: t.chunk(3, dim=-1)[0],
    lambda t: torch.split(t, [1, t.shape[1] - 1], dim=1)[1],
    lambda t: torch.unbind(t, dim=0)[-1],
    lambda t: t.unsqueeze(0),
    lambda t: t.unsqueeze(-1).squeeze(-1),
    lambda t: t.flatten(0, 1),
    lambda t: t.reshape(2, -1),
    lambda t: t.permute(*reversed(range(t.ndim))),
]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(CHANGES), max_size=5))
def test_an_address_goes_where_the_tensor_goes(changes: list[Any]) -> None:
    real = torch.arange(6, 6 + 48).reshape(4, 6, 2)
    symbol: Any = address(6, 4, 6, 2)
    for change in changes:
        try:
            after = change(real)
        except (RuntimeError, IndexError):  # this change does not fit this shape
            continue
        if after.ndim == 0 or not 0 < after.numel() <= 500:
            continue
        real, symbol = after, change(symbol)
        assert symbol.shape == real.shape
    assert torch.equal(elements(symbol), real)


def test_gate_then_up_is_one_piece() -> None:
    both = torch.cat([address(0, 3, 4), address(12, 3, 4)], dim=0)
    assert views_along(both, 0) == [address(0, 6, 4)]


def test_up_then_gate_is_two() -> None:
    both = torch.cat([address(12, 3, 4), address(0, 3, 4)], dim=0)
    assert len(views_along(both, 0)) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda t: torch.flip(t, dims=[0]),
        lambda t: t.reshape(5, 5),
        lambda t: torch.stack([t, t.transpose(0, 1)]),
        lambda t: torch.cat([t, t.unbind(0)[0].unsqueeze(0).transpose(0, 1)], dim=1),
    ],
)
def test_what_is_not_a_view_is_refused(change: Any) -> None:
    with pytest.raises(NotAView):
        change(address(0, 4, 6))


def test_a_view_knows_its_bytes() -> None:
    view = View.whole(2, 100, 2, "bfloat16", (3, 4)).transpose(0, 1)
    assert [(v.file, v.start, v.end, v.nbytes) for v in views(view)] == [(2, 100, 124, 24)]


# --------------------------------------------------------------------------------- whole models


def described(model: torch.nn.Module) -> list[ExpertsModule]:
    return [module for module, _ in configs.experts_of(model)]


def opened(folder: Path, family: str = "qwen3_moe") -> dict[ExpertId, ExpertLayout]:
    model = configs.load(family, folder)
    return Checkpoint.open(folder).layouts(model, described(model))


def test_an_expert_saved_by_transformers_is_one_read(tmp_path: Path) -> None:
    configs.build("qwen3_moe", tmp_path)
    for layout in opened(tmp_path).values():
        assert len(layout.reads) == 1
        assert [len(pieces) for pieces in layout.params.values()] == [1, 1]
        assert layout.params["gate_up_proj"][0].shape == (96, 64)


def test_shards_do_not_matter(tmp_path: Path) -> None:
    model = configs.build("mixtral", tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="100KB")
    checkpoint = Checkpoint.open(tmp_path / "many")
    whole, sharded = opened(tmp_path / "one", "mixtral"), opened(tmp_path / "many", "mixtral")

    assert len(checkpoint.files) > 3
    assert checkpoint.nbytes == Checkpoint.open(tmp_path / "one").nbytes
    assert {e: x.nbytes for e, x in whole.items()} == {e: x.nbytes for e, x in sharded.items()}
    assert len({read.file for layout in sharded.values() for read in layout.reads}) > 1


def test_a_checkpoint_of_the_base_model_has_other_names(tmp_path: Path) -> None:
    model = configs.build("qwen3_moe", tmp_path / "full")
    model.base_model.save_pretrained(tmp_path / "base")
    names = Checkpoint.open(tmp_path / "base").tensors

    assert not any(name.startswith("model.") for name in names)
    assert opened(tmp_path / "base").keys() == opened(tmp_path / "full").keys()


def test_tensors_the_model_has_no_use_for_are_nobodys(tmp_path: Path) -> None:
    configs.build("qwen3_moe", tmp_path)
    before = load_file(tmp_path / "model.safetensors")
    after = before | {"model.layers.9.mlp.experts.0.up_proj.weight": torch.ones(48, 64)}
    save_file(after, tmp_path / "model.safetensors", {"format": "pt"})
    model = configs.load("qwen3_moe", tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    modules = described(model)
    experts = sum(layout.nbytes for layout in checkpoint.layouts(model, modules).values())
    dense = checkpoint.dense_bytes(model, modules)

    assert dense.keys() == {"F32"}
    assert experts + dense["F32"] + 4 * 48 * 64 == checkpoint.nbytes


def test_the_stored_dtype_is_kept(tmp_path: Path) -> None:
    configs.build("qwen3_moe", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    narrow = {k: v.to(torch.bfloat16) if "experts" in k else v for k, v in weights.items()}
    save_file(narrow, tmp_path / "model.safetensors", {"format": "pt"})

    for layout in opened(tmp_path).values():
        assert {p.dtype for pieces in layout.params.values() for p in pieces} == {"bfloat16"}
