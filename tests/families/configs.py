"""A tiny random model of every family that `understudy.families` discovers.

Knows: which numbers make a transformers configuration small, and the few families that need more
than that. Does not know: a list of families; they come from the installed transformers.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from understudy.checkpoint import ExpertsModule
from understudy.families import Family, experts_classes, families

LAYERS = 3
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
    **dict.fromkeys(("output_dim", "adapter_in_dim", "adapter_out_dim", "thinker_hidden_size"), 64),
    **dict.fromkeys(("adapter_input_size", "projector_hidden_size", "projection_hidden_dim"), 64),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "projection_intermediate_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_intermediate_size"), 48),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_experts_intermediate_size"), 40),
    **dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("head_dim", "v_head_dim", "index_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 24),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), 8),
    **dict.fromkeys(("index_n_heads", "linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("linear_num_heads", "swa_num_attention_heads", "mamba_num_heads"), 4),
    **dict.fromkeys(("swa_num_key_value_heads", "n_groups", "mamba_n_groups"), 2),
    **dict.fromkeys(("swa_head_dim", "mamba_head_dim", "ssm_state_size", "hc_lowrank"), 16),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "mlp_dim", "moe_hidden_size"), 40),
    **dict.fromkeys(("downsample_hidden_size", "output_channels"), 16),
    "downsample_channels": [16, 64],
    "global_attn_indexes": [0],
    "hidden_sizes": (16, 16, 16, 64),  # of an audio tower
    "moe_latent_size": 32,
    "mel_vocab_size": 16,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
}

# What a family needs beyond that; a dotted name reaches into a part of the configuration.
MORE: dict[str, dict[str, Any]] = {
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention", "full_attention"]},
    "deepseek_ocr2": {"text_config.mlp_layer_types": ["dense", "sparse", "sparse"]},
    "dots3_note": {
        "vision_config.pyramid_num_routed": [-1, EXPERTS, EXPERTS],
        "text_config.layer_types": ["indexed_attention"] * LAYERS,
    },
    "ernie4_5_vl_moe": {
        "text_config.moe_intermediate_size": [48, 32],  # text and vision experts differ
        "text_config.rope_parameters": {"rope_type": "default", "mrope_section": [3, 3, 2]},
    },
    "flint": {"mlp_only_layers": [0]},
    "gemma4": {"text_config.enable_moe_block": True},
    "glm4v_moe": {
        "text_config.rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}
    },
    "glm5_next": {
        "text_config.qk_rope_head_dim": 0,
        "text_config.layer_types": ["linear_attention", "indexed_attention", "indexed_attention"],
        "text_config.mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "attention"],
        "mamba_chunk_size": 8,  # 256 is padded to, and takes seconds
    },
    "inkling": {"vision_config.num_hidden_layers": 4, "vision_config.patch_size": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_offset": 0},
    "nemotron_h": {"layer_types": ["linear_attention", "moe", "full_attention", "moe"]},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "full_attention"]},
    "muse_spark": {"audio_config.num_hidden_layers": 4},
    "qwen3_5_moe": {
        "text_config.layer_types": ["linear_attention", "full_attention", "full_attention"]
    },
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention", "full_attention"]},
    "qwen3_omni_moe": {"vision_start_token_id": VOCABULARY - 1},
    "qwen4_exp": {
        "text_config.layer_types": ["linear_attention", "indexed_attention", "indexed_attention"],
        "text_config.indexer_n_heads": 2,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": 16,
        "text_config.indexer_budget": 32,
        "text_config.indexer_compress_ratio": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}

# Where the first class of the modelling file is not the one that a checkpoint is loaded with.
CLASSES = {"qwen3_omni_moe": "Qwen3OmniMoeThinkerForConditionalGeneration"}


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
        for router in model.modules():  # routes by token from a table that only a checkpoint fills
            if isinstance(table := getattr(router, "tid2eid", None), torch.Tensor):
                order = torch.rand(len(table), router.num_experts).argsort(-1)
                table.copy_(order[:, : router.top_k])
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


def experts_of(model: nn.Module) -> Iterator[tuple[ExpertsModule, nn.Module]]:
    """The Experts modules of a model, described as `ExpertsModule` says."""
    layer = 0
    for name, module in model.named_modules():
        if type(module).__name__ not in experts_classes():
            continue
        count = module.num_experts
        params = {
            key: tuple(param.shape)
            for key, param in module.named_parameters(recurse=False)
            if param.ndim >= 2 and param.shape[0] == count
        }
        yield ExpertsModule(name, layer, count, params, module.is_transposed), module
        layer += 1


def _model_class(family: Family) -> type[PreTrainedModel]:
    module = importlib.import_module(family.modeling_module)
    if family.name in CLASSES:
        return getattr(module, CLASSES[family.name])
    classes = [
        c
        for c in vars(module).values()
        if isinstance(c, type)
        and issubclass(c, PreTrainedModel)
        and c.__module__ == module.__name__
        and not c.__name__.endswith("PreTrainedModel")
    ]
    for ending in ("ForConditionalGeneration", "ForCausalLM"):
        fitting = [c for c in classes if c.__name__.endswith(ending)]
        if fitting:
            return fitting[0]
    return classes[-1]


def _shrink(config_class: type[PreTrainedConfig], more: dict[str, Any]) -> PreTrainedConfig:
    defaults = {f.name: f.default for f in fields(config_class)}
    kwargs = {name: SMALL[name] for name in defaults if name in SMALL}
    if "num_key_value_heads" in defaults:  # as many as heads, where that is the family's nature
        same = defaults["num_key_value_heads"] == defaults["num_attention_heads"]
        kwargs["num_key_value_heads"] = kwargs["num_attention_heads"] // (1 if same else 2)
    if config_class.sub_configs:
        default = config_class()
        for part in config_class.sub_configs:
            if getattr(default, part, None) is None:
                continue
            inside = {k.partition(".")[2]: v for k, v in more.items() if k.startswith(f"{part}.")}
            kwargs[part] = _shrink(type(getattr(default, part)), inside)
    kwargs |= {k: v for k, v in more.items() if "." not in k}
    return config_class(**kwargs)
