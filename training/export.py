"""Trained weights into transformers' own models, and from there into a checkpoint folder.

Knows the names transformers gives to each tensor and how a folder in `models/` looks. Does not
know how the weights were trained.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from training.moe import Shape

SHARD = "15MB"


def config(shape: Shape) -> MixtralConfig | Qwen3MoeConfig:
    """The shape in transformers' words. Id 0 is begin, end and padding."""
    common: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": shape.positions,
        "num_experts_per_tok": shape.top_k,
        "rope_parameters": {"rope_theta": shape.theta, "rope_type": "default"},
        "rms_norm_eps": shape.eps,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if shape.family == "mixtral":
        return MixtralConfig(
            intermediate_size=shape.width, num_local_experts=shape.experts, **common
        )
    return Qwen3MoeConfig(
        moe_intermediate_size=shape.width,
        intermediate_size=shape.width,
        num_experts=shape.experts,
        norm_topk_prob=True,
        **common,
    )


def state(shape: Shape, weight: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under transformers' names (those it has in memory)."""
    parts = [shape.heads * shape.head_dim, *2 * [shape.kv_heads * shape.head_dim]]
    found = {
        "model.embed_tokens.weight": weight["embed"],
        "lm_head.weight": weight["embed"],
        "model.norm.weight": weight["norm"],
    }
    renamed = {
        "o": "self_attn.o_proj.weight",
        "q_norm": "self_attn.q_norm.weight",
        "k_norm": "self_attn.k_norm.weight",
        "norm1": "input_layernorm.weight",
        "norm2": "post_attention_layernorm.weight",
        "router": "mlp.gate.weight",
        "gate_up": "mlp.experts.gate_up_proj",
        "down": "mlp.experts.down_proj",
    }
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}."
        joint = torch.split(weight[f"{layer}.qkv"], parts)
        for name, part in zip("qkv", joint, strict=True):
            found[f"{prefix}self_attn.{name}_proj.weight"] = part
        for short, name in renamed.items():
            if f"{layer}.{short}" in weight:
                found[prefix + name] = weight[f"{layer}.{short}"]
    return {name: tensor.detach() for name, tensor in found.items()}


def build(
    shape: Shape, weight: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16
) -> MixtralForCausalLM | Qwen3MoeForCausalLM:
    """transformers' model with these weights; missing or surplus names are errors."""
    kind = MixtralForCausalLM if shape.family == "mixtral" else Qwen3MoeForCausalLM
    model = kind(config(shape)).to(dtype)
    model.load_state_dict(state(shape, weight), strict=True)
    return model.eval()


def write(shape: Shape, weight: dict[str, Tensor], folder: Path) -> None:
    """The checkpoint as `save_pretrained` writes it: one gate, up and down tensor per expert."""
    build(shape, weight).save_pretrained(folder, max_shard_size=SHARD)
