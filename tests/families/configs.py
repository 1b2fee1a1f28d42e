"""A tiny random model of every family that `understudy.families` discovers.

Knows: which numbers make a transformers configuration small, and the few families that need more
than that. Does not know: a list of families; they come from the installed transformers.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from understudy.families import Family, families

EXPERTS = 4
TOP_K = 2
VOCABULARY = 128

# Field name -> small value, wherever a configuration (or a part of one) has that field.
SMALL: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), VOCABULARY),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), EXPERTS),
    "moe_num_experts": EXPERTS,
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts"), TOP_K),
    **dict.fromkeys(("hidden_size", "d_model", "out_hidden_size", "text_hidden_size"), 64),
    **dict.fromkeys(("intermediate_size", "shared_expert_intermediate_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
}

# What a family needs beyond that; a dotted name reaches into a part of the configuration.
MORE: dict[str, dict[str, Any]] = {}


@dataclass(frozen=True)
class Tiny:
    """The class to build and the configuration to build it with."""

    model_class: type[PreTrainedModel]
    config: PreTrainedConfig


def tiny(family: str) -> Tiny:
    """A small model with experts: the multi-modal class where there is one, else the text one."""
    model_class = _model_class(families()[family])
    config = _shrink(model_class.config_class, MORE.get(family, {}))
    config._experts_implementation = "eager"
    return Tiny(model_class, config)


def build(family: str, folder: Path) -> PreTrainedModel:
    """Save a tiny fp32 model with random weights to ``folder``; returns that model."""
    found = tiny(family)
    torch.manual_seed(0)
    model = found.model_class(found.config).eval()
    with torch.no_grad():
        for param in model.parameters():  # no zeros or ones: a mix-up of two must show
            param.add_(torch.randn_like(param) * 0.05)
    model.save_pretrained(folder)
    return model


def load(family: str, folder: Path) -> PreTrainedModel:
    """The saved model, loaded by transformers itself."""
    model: PreTrainedModel = tiny(family).model_class.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    )
    return model.eval()


def inputs(family: str, model: PreTrainedModel) -> dict[str, Any]:
    """What the forward of a tiny model takes; text only."""
    torch.manual_seed(1)
    ids = torch.randint(5, VOCABULARY - 5, (1, 7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _model_class(family: Family) -> type[PreTrainedModel]:
    module = importlib.import_module(family.modeling_module)
    classes = [
        c
        for c in vars(module).values()
        if isinstance(c, type)
        and issubclass(c, PreTrainedModel)
        and c.__module__ == module.__name__
        and not c.__name__.endswith("PreTrainedModel")
    ]
    for ending in ("ForConditionalGeneration", "ForCausalLM", "Model"):
        fitting = [c for c in classes if c.__name__.endswith(ending)]
        if fitting:
            return fitting[-1]
    return classes[-1]


def _shrink(config_class: type[PreTrainedConfig], more: dict[str, Any]) -> PreTrainedConfig:
    kwargs = {f.name: SMALL[f.name] for f in fields(config_class) if f.name in SMALL}
    if config_class.sub_configs:
        default = config_class()
        for part in config_class.sub_configs:
            if getattr(default, part, None) is None:
                continue
            inside = {k.partition(".")[2]: v for k, v in more.items() if k.startswith(f"{part}.")}
            kwargs[part] = _shrink(type(getattr(default, part)), inside)
    kwargs |= {k: v for k, v in more.items() if "." not in k}
    return config_class(**kwargs)
