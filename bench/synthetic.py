"""Random-weight checkpoints of the Qwen3-MoE shape, to vary what trained models do not let vary.

Knows: names and shapes of the tensors. Random routers choose nearly uniformly, which no trained
model does: use these for how cost grows, never to judge a policy. Written one expert at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.cells import Bar
from understudy import demo, native

LAYERS, TOP_K, HIDDEN, WIDTH, HEADS, KV_HEADS, HEAD = 8, 4, 1024, 512, 4, 2, 64


def checkpoint(experts: int, bar: Bar) -> Path:
    """A model with ``experts`` experts of 3 MiB in each of 8 layers, made once into the cache."""
    source = demo.models_folder() / "fine"  # its tokenizer, its vocabulary
    folder = native.cache_folder() / f"synthetic-{LAYERS}x{experts}"
    if folder.is_dir():
        return folder
    demo.check_disk(folder.parent, LAYERS * experts * 3 * HIDDEN * WIDTH * 2)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    report = bar(f"making {folder.name}, once")
    config = _config(json.loads((source / "config.json").read_text(encoding="utf-8")), experts)
    (partial / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for file in source.glob("tokenizer*"):
        shutil.copyfile(file, partial / file.name)
    generator = torch.Generator().manual_seed(experts)
    weights = {}
    for done, (file_name, tensors) in enumerate(_files(config, generator), start=1):
        save_file(tensors, partial / file_name, metadata={"format": "pt"})
        weights.update(dict.fromkeys(tensors, file_name))
        report(done, LAYERS + 1)
    index = {"metadata": {}, "weight_map": weights}
    (partial / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    partial.rename(folder)
    return folder


def _config(config: dict[str, Any], experts: int) -> dict[str, Any]:
    shape = {
        "hidden_size": HIDDEN,
        "moe_intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_local_experts": experts,
        "num_experts": experts,
        "num_experts_per_tok": TOP_K,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
    }
    return config | shape


def _files(
    config: dict[str, Any], generator: torch.Generator
) -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """One file per layer, then one for what is outside the layers."""

    def random(*shape: int) -> torch.Tensor:
        # Of unit gain, so that the residual stream neither dies nor explodes.
        return torch.randn(shape, generator=generator).mul_(shape[-1] ** -0.5).to(torch.bfloat16)

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    count = LAYERS + 1
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        tensors = {
            f"{at}input_layernorm.weight": ones(HIDDEN),
            f"{at}post_attention_layernorm.weight": ones(HIDDEN),
            f"{at}self_attn.q_proj.weight": random(HEADS * HEAD, HIDDEN),
            f"{at}self_attn.k_proj.weight": random(KV_HEADS * HEAD, HIDDEN),
            f"{at}self_attn.v_proj.weight": random(KV_HEADS * HEAD, HIDDEN),
            f"{at}self_attn.o_proj.weight": random(HIDDEN, HEADS * HEAD),
            f"{at}self_attn.q_norm.weight": ones(HEAD),
            f"{at}self_attn.k_norm.weight": ones(HEAD),
            f"{at}mlp.gate.weight": random(config["num_experts"], HIDDEN),
        }
        for expert in range(config["num_experts"]):
            one = f"{at}mlp.experts.{expert}."
            tensors[f"{one}down_proj.weight"] = random(HIDDEN, WIDTH)
            tensors[f"{one}gate_proj.weight"] = random(WIDTH, HIDDEN)
            tensors[f"{one}up_proj.weight"] = random(WIDTH, HIDDEN)
        yield f"model-{layer + 1:05d}-of-{count:05d}.safetensors", tensors
    outside = {
        "model.embed_tokens.weight": random(config["vocab_size"], HIDDEN),
        "model.norm.weight": ones(HIDDEN),
    }
    yield f"model-{count:05d}-of-{count:05d}.safetensors", outside
