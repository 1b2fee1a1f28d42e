"""A model of a recorded model's shape: random weights, and routers that read from the record.

Knows: names and shapes of a Qwen3-MoE checkpoint, how a recorded route becomes tables, and how a
checkpoint of 57 GB is described that is a few MB on disk: its experts are few different ones, and
their byte ranges point into one small file again and again. Whoever holds them, holds them all.
Does not know: who loads it, or what is measured.

What is real about it: shapes, bytes, and which expert each token asks for. What is not: the words
it says. Two things must be said wherever its figures stand:

* The record lowers top-k from 8 to 6, is one prompt of 156 tokens, and so flatters a cache.
* It holds no hidden states, so nobody can ask a real router what it foresees. What look-ahead is
  told here is the recorded answer with a share of it exchanged for others, drawn with a seed: its
  recall is an assumption, handed in, not a measurement.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeForCausalLM

from understudy import demo
from understudy import model as guest
from understudy.checkpoint import Checkpoint, TensorInfo
from understudy.checkpoint.files import BITS
from understudy.core import UnderstudyError
from understudy.loading import Anatomy

DISTINCT = 8  # different experts in the file
PAGE = 4096
POOL = (1 << 22) - 3  # random numbers that dense weights are made of; odd, so that rows differ
KINDS = {torch.bfloat16: "BF16", torch.int64: "I64"}


# ----------------------------------------------------------------------------------- the record


@dataclass(frozen=True)
class Routes:
    """Who ran: ``ids`` int64 and ``weights`` float32, both [tokens, layers, k]; ``prompt``: how
    many of the tokens were read in one go; ``experts``: per layer."""

    ids: torch.Tensor
    weights: torch.Tensor
    prompt: int
    experts: int

    @classmethod
    def read(cls, path: Path) -> Routes:
        """The first text of a public route CSV. Not by `understudy.trace`, which needs pyarrow: a
        machine that is lent for minutes has what torch needs and little else."""
        lines = path.read_text(encoding="utf-8").splitlines()
        told = dict(word.partition("=")[::2] for line in lines if line[:1] == "#"
                    for word in line.split())  # fmt: skip
        if not {"n_expert", "n_expert_used"} <= told.keys():
            raise UnderstudyError(f"{path}: not a route CSV, its head tells no n_expert_used")
        found: dict[tuple[int, int], list[tuple[int, float]]] = {}
        for row in csv.DictReader(line for line in lines if line[:1] != "#"):
            if row["turn"] == "0":
                pair = int(row["expert"]), float(row["weight"])
                found.setdefault((_step(row), int(row["layer"])), []).append(pair)
        k, layers = int(told["n_expert_used"]), 1 + max(layer for _, layer in found)
        steps = [[found.get((step, layer), []) for layer in range(layers)]
                 for step in dict.fromkeys(step for step, _ in found)]  # fmt: skip
        if any(not pairs or len(pairs) % k for step in steps for pairs in step):
            raise UnderstudyError(f"{path}: a step of it lacks layers or ranks; record it again")
        tables = torch.cat([_table(step, k) for step in steps])
        ids, weights = tables[..., 0].long(), tables[..., 1].float()
        return cls(ids, weights, len(steps[0][0]) // k, int(told["n_expert"]))

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def cut(self, layers: int) -> Routes:
        """The first ``layers`` layers, where a machine cannot hold them all."""
        return Routes(self.ids[:, :layers], self.weights[:, :layers], self.prompt, self.experts)


def _step(row: Mapping[str, str]) -> int:
    """All of the prompt is one step."""
    return int(row["step"]) if row["phase"] == "1" else -1


def _table(layers: Sequence[Sequence[tuple[int, float]]], k: int) -> torch.Tensor:
    """[tokens, layers, k, 2], fp64, of one step. Of a prompt, some programs run the last layer for
    its last token only: there the tokens before it get the same row."""
    tokens = max(map(len, layers)) // k
    rows = [torch.tensor(pairs, dtype=torch.float64).view(-1, k, 2) for pairs in layers]
    full = [torch.cat([row[:1].expand(tokens - len(row), -1, -1), row]) for row in rows]
    return torch.stack(full, dim=1)


def corrupted(ids: torch.Tensor, experts: int, recall: float, seed: int) -> torch.Tensor:
    """``ids`` [..., k] with a share of 1 - ``recall`` exchanged for experts that are not among the
    row's, all of a row still different. The same seed gives the same answer."""
    generator = torch.Generator().manual_seed(seed)
    rows = ids.reshape(-1, ids.shape[-1])
    # A random order of all experts, the row's own last: whoever is exchanged takes the next of it.
    order = torch.rand(len(rows), experts, generator=generator)
    order.scatter_(1, rows, 2.0)
    others = order.argsort(dim=1)[:, : rows.shape[1]]
    wrong = torch.rand(rows.shape, generator=generator) >= recall
    return torch.where(wrong, others, rows).view_as(ids)


# ------------------------------------------------------------------------------- the model class


class ForcedConfig(Qwen3MoeConfig):  # type: ignore[misc]
    """``trace_tokens``: how many tokens the tables know; later ones begin again."""

    trace_tokens: int = 1


class Place(nn.Module):
    """Which row of the tables the current forward begins at: a number on the device, set from the
    position ids of each forward, so that a recorded step finds its own row when it is repeated.
    ``offset``: the row of position 0; whoever measures moves it from round to round."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.register_buffer("start", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("offset", torch.zeros(1, dtype=torch.int64))
        self.start: torch.Tensor
        self.offset: torch.Tensor

    def set(self, position_ids: torch.Tensor) -> None:
        first = position_ids.reshape(-1)[:1]
        self.start.copy_((first + self.offset) % self.tokens)

    def rows(self, count: int) -> torch.Tensor:
        """[count]: of the tables, for this forward's tokens."""
        if count == 1:
            return self.start
        return (self.start + torch.arange(count, device=self.start.device)) % self.tokens


class ForcedRouter(nn.Module):
    """In a router's place. The model calls the module and gets the recorded answer; look-ahead
    calls ``forward``, as everybody does who asks a router about another layer's input, and gets
    what was foreseen."""

    def __init__(self, config: ForcedConfig, place: Place) -> None:
        super().__init__()
        shape = config.trace_tokens, config.num_experts_per_tok
        for name in ("ids", "foreseen"):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("weights", torch.zeros(shape))
        self.ids: torch.Tensor
        self.foreseen: torch.Tensor
        self.weights: torch.Tensor
        self._place = (place,)  # not a module of ours: its buffers are listed once
        self._routing = False
        self.register_forward_pre_hook(ForcedRouter._called)

    def _called(self, args: Any) -> None:
        self._routing = True

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Weights in place of logits (nobody reads them), weights and ids, all [T, k]."""
        table, self._routing = (self.ids if self._routing else self.foreseen), False
        rows = self._place[0].rows(hidden.numel() // hidden.shape[-1])
        weights = self.weights.index_select(0, rows)
        return weights, weights, table.index_select(0, rows)


class ForcedForCausalLM(Qwen3MoeForCausalLM):  # type: ignore[misc]
    """Qwen3-MoE with `ForcedRouter` for its routers. Everything else is transformers'."""

    config_class = ForcedConfig

    def __init__(self, config: ForcedConfig) -> None:
        super().__init__(config)
        self.place = Place(config.trace_tokens)
        for layer in self.model.layers:
            layer.mlp.gate = ForcedRouter(config, self.place)
        # The one module that is told the positions before any layer runs.
        self.model.rotary_emb.register_forward_pre_hook(self._positions, with_kwargs=True)

    def _positions(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.place.set(kwargs["position_ids"] if "position_ids" in kwargs else args[1])


AutoModelForCausalLM.register(ForcedConfig, ForcedForCausalLM, exist_ok=True)


# -------------------------------------------------------------------------------- the checkpoint


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the model, but for what the record says: layers, experts, k."""

    hidden: int
    width: int
    heads: int
    kv_heads: int
    head: int
    vocab: int

    def config(self, routes: Routes) -> ForcedConfig:
        _, layers, k = routes.ids.shape
        return ForcedConfig(
            trace_tokens=routes.tokens,
            hidden_size=self.hidden,
            moe_intermediate_size=self.width,
            intermediate_size=self.width,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head,
            vocab_size=self.vocab,
            num_hidden_layers=layers,
            num_local_experts=routes.experts,
            num_experts_per_tok=k,
            norm_topk_prob=True,
            sliding_window=None,
            tie_word_embeddings=False,
            max_position_embeddings=4096,
            dtype="bfloat16",
            eos_token_id=0,
            pad_token_id=0,
        )


QWEN3 = Shape(hidden=2048, width=768, heads=32, kv_heads=4, head=128, vocab=151936)


@dataclass(frozen=True)
class Forced(Anatomy):
    """An anatomy whose dense weights are in memory and whose experts share one small file."""

    dense: dict[str, torch.Tensor] = field(default_factory=dict, repr=False)

    def unpacked_dense(self, dtype: Any) -> dict[str, torch.Tensor]:
        return dict(self.dense)


def forced(folder: Path, shape: Shape, routes: Routes, recall: float, seed: int = 0) -> Forced:
    """The anatomy, with what it needs on disk written to ``folder`` now if it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    experts = _experts_file(folder, shape, seed)
    for file in (demo.models_folder() / "fine").glob("tokenizer*"):
        shutil.copyfile(file, folder / file.name)
    config = shape.config(routes)
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen3_moe"}), encoding="utf-8")
    bones = guest.skeleton(config)
    modules = guest.find_experts(bones)
    dense = dict(_dense(bones, modules, routes, recall, seed))
    tensors = {t.name: t for t in (*_dense_infos(dense), *_expert_infos(config))}
    checkpoint = Checkpoint(folder, (experts,), MappingProxyType(tensors), config)
    return Forced(checkpoint, bones, modules, checkpoint.layouts(bones, modules), dense)


def _expert_matrices(shape: Shape) -> dict[str, tuple[int, int]]:
    """In the order in which `save_pretrained` lays them."""
    wide, narrow = (shape.width, shape.hidden), (shape.hidden, shape.width)
    return {"down_proj": narrow, "gate_proj": wide, "up_proj": wide}


def _record_bytes(hidden: int, width: int) -> int:
    """One expert of the file, in whole pages."""
    return -(-3 * hidden * width * 2 // PAGE) * PAGE


def _experts_file(folder: Path, shape: Shape, seed: int) -> Path:
    """Few different experts, one after the other, bf16."""
    path = folder / f"experts-{shape.hidden}x{shape.width}-{seed}.bin"
    size = _record_bytes(shape.hidden, shape.width)
    if path.is_file() and path.stat().st_size == DISTINCT * size:
        return path
    generator = torch.Generator().manual_seed(seed)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        for number in range(DISTINCT):
            for rows, columns in _expert_matrices(shape).values():
                matrix = torch.randn(rows, columns, generator=generator) * columns**-0.5
                file.write(matrix.bfloat16().view(torch.uint8).numpy().data)
            file.write(bytes((number + 1) * size - file.tell()))
    os.replace(partial, path)
    return path


def _expert_infos(config: ForcedConfig) -> Iterator[TensorInfo]:
    """Every expert's tensors, where one of the different experts lies."""
    hidden, width = config.hidden_size, config.moe_intermediate_size
    shape = Shape(hidden, width, 0, 0, 0, 0)
    for layer in range(config.num_hidden_layers):
        for expert in range(config.num_local_experts):
            # Neighbours in a layer differ, and so does one expert's number in the next layer.
            at = (layer + expert) % DISTINCT * _record_bytes(hidden, width)
            for name, size in _expert_matrices(shape).items():
                full = f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight"
                nbytes = 2 * prod(size)
                yield TensorInfo(full, 0, at, nbytes, "BF16", size)
                at += nbytes


def _dense_infos(dense: dict[str, torch.Tensor]) -> Iterator[TensorInfo]:
    """So that they are counted. They lie nowhere: `Forced.unpacked_dense` has them."""
    for name, tensor in dense.items():
        kind = KINDS[tensor.dtype]
        assert tensor.nbytes == tensor.numel() * BITS[kind] // 8
        yield TensorInfo(name, 0, 0, tensor.nbytes, kind, tuple(tensor.shape))


def _dense(
    bones: Any, modules: Any, routes: Routes, recall: float, seed: int
) -> Iterator[tuple[str, torch.Tensor]]:
    """Norms of one, matrices of unit gain, and the tables of the routers."""
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(seed)).bfloat16()
    tables = _tables(routes, recall, seed)
    experts = {key for module in modules for key in module.keys()}  # noqa: SIM118 (its method)
    for name, tensor in bones.state_dict().items():
        if name in experts:
            continue
        if name in tables:
            yield name, tables[name]
        elif tensor.dtype == torch.int64:
            yield name, torch.zeros(tensor.shape, dtype=torch.int64)
        elif tensor.ndim == 1:
            yield name, torch.ones(tensor.shape, dtype=torch.bfloat16)
        else:
            yield name, _tiled(pool, tensor.shape)


def _tables(routes: Routes, recall: float, seed: int) -> dict[str, torch.Tensor]:
    foreseen = corrupted(routes.ids, routes.experts, recall, seed)
    found = {}
    for layer in range(routes.ids.shape[1]):
        at = f"model.layers.{layer}.mlp.gate."
        found[f"{at}ids"] = routes.ids[:, layer].contiguous()
        found[f"{at}foreseen"] = foreseen[:, layer].contiguous()
        found[f"{at}weights"] = routes.weights[:, layer].bfloat16().contiguous()
    return found


def _tiled(pool: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A matrix of the pool's numbers, repeated: drawing billions would take a minute."""
    out = torch.empty(shape, dtype=pool.dtype)
    flat = out.view(-1)
    for start in range(0, len(flat), len(pool)):
        part = flat[start : start + len(pool)]
        torch.mul(pool[: len(part)], shape[-1] ** -0.5, out=part)
    return out
