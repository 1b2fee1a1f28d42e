"""Writes a Mixtral- or Qwen3-MoE-shaped checkpoint as GGUF: the same weights for llama.cpp.

Knows: the tensor names of both worlds, which tensors llama.cpp keeps in fp32 (norms, routers), and
that its Mixtral wants the rows of q and k in another order (rotary pairs lie next to each other
there). Tensors are written one by one; the largest held at once is one matrix of all experts of a
layer. Does not know: how llama.cpp is run.

    bf16   every matrix as stored
    q8_0   every matrix in blocks of 32 with one scale
    q4_0   the same in 4 bits, embedding and output in q8_0 (as is usual: they are used every token)
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

QUANTIZATIONS = ("bf16", "q8_0", "q4_0")
ARCHITECTURE = {"mixtral": "llama", "qwen3_moe": "qwen3moe"}
NORMAL, CONTROL = 1, 3  # token types

# Ours -> theirs, for one decoder layer. Experts are stacked, see `_EXPERTS`.
_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}
_OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_EXPERTS = {
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
    "w1": "ffn_gate_exps",
    "w3": "ffn_up_exps",
    "w2": "ffn_down_exps",
}
_EXPERT = re.compile(
    r"model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight"
)
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor of the GGUF file and the tensors it is made of (several: stacked experts)."""

    name: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]


def write(
    model: Path,
    path: Path,
    quantization: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write ``model`` to ``path``; it appears whole or not at all."""
    import gguf

    if quantization not in QUANTIZATIONS:
        raise ValueError(f"unknown GGUF format {quantization!r}; use {', '.join(QUANTIZATIONS)}")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    family = config["model_type"]
    if family not in ARCHITECTURE:
        raise ValueError(f"can write {' and '.join(ARCHITECTURE)} as GGUF, not {family!r}")
    partial = path.with_name(f".{path.name}.partial")
    writer = gguf.GGUFWriter(partial, ARCHITECTURE[family])
    stored = Stored(model)
    try:
        _describe(writer, config, model)
        targets = list(_targets(stored))
        kinds = [_kind(target, quantization) for target in targets]
        for target, kind in zip(targets, kinds, strict=True):
            _announce(writer, target, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, (target, kind) in enumerate(zip(targets, kinds, strict=True), start=1):
            writer.write_tensor_data(_encoded(stored, target, kind, config))
            progress(done, len(targets))
        writer.close()
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------ reading ours


class Stored:
    """All tensors of a safetensors folder, opened one at a time."""

    def __init__(self, folder: Path) -> None:
        self._files = {}
        for file in sorted(folder.glob("*.safetensors")):
            opened = safe_open(file, framework="pt")
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                self._files[name] = opened
        if not self._files:
            raise FileNotFoundError(f"{folder} has no .safetensors file")

    @property
    def names(self) -> list[str]:
        return list(self._files)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._files[name].get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        return self._files[name].get_tensor(name)


def _targets(stored: Stored) -> Iterator[Target]:
    """Tensors in the order in which a forward pass uses them, as llama.cpp's own files have it."""
    plain: dict[str, str] = {}
    stacks: dict[tuple[int, str], dict[int, str]] = {}
    for name in stored.names:
        if match := _EXPERT.fullmatch(name):
            layer, expert, matrix = int(match[1]), int(match[2]), _EXPERTS[match[3]]
            stacks.setdefault((layer, matrix), {})[expert] = name
        else:
            plain[_outside_experts(name)] = name
    if "output.weight" not in plain:  # tied: said by writing it twice, which every reader accepts
        plain["output.weight"] = plain["token_embd.weight"]
    for target, name in plain.items():
        yield Target(target, (name,), stored.shape(name))
    for (layer, matrix), found in sorted(stacks.items()):
        names = tuple(found[expert] for expert in range(len(found)))
        yield Target(f"blk.{layer}.{matrix}.weight", names, (len(names), *stored.shape(names[0])))


def _outside_experts(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    match = _IN_LAYER.fullmatch(name)
    if match is None or match[2] not in _LAYER:
        raise ValueError(f"no GGUF name is known for {name}")
    return f"blk.{match[1]}.{_LAYER[match[2]]}.weight"


# ----------------------------------------------------------------------------------- writing theirs


def _kind(target: Target, quantization: str) -> Any:
    """How one tensor is stored."""
    from gguf import GGMLQuantizationType as Kind

    if len(target.shape) == 1 or "ffn_gate_inp" in target.name:
        return Kind.F32
    if quantization == "q4_0" and not target.name.startswith("blk."):
        return Kind.Q8_0
    return {"bf16": Kind.BF16, "q8_0": Kind.Q8_0, "q4_0": Kind.Q4_0}[quantization]


def _announce(writer: Any, target: Target, kind: Any) -> None:
    from gguf import GGMLQuantizationType as Kind
    from gguf.quants import quant_shape_to_byte_shape

    if kind is Kind.F32:
        nbytes = int(np.prod(target.shape)) * 4
        writer.add_tensor_info(target.name, target.shape, np.dtype(np.float32), nbytes)
        return
    shape = quant_shape_to_byte_shape(target.shape, kind)
    nbytes = int(np.prod(shape))
    writer.add_tensor_info(target.name, shape, np.dtype(np.uint8), nbytes, raw_dtype=kind)


def _encoded(stored: Stored, target: Target, kind: Any, config: dict[str, Any]) -> Any:
    from gguf import GGMLQuantizationType as Kind
    from gguf.quants import quantize

    parts = []
    for name in target.sources:
        matrix = _reordered(stored.tensor(name), name, config)
        if kind is Kind.BF16 and matrix.dtype is torch.bfloat16:
            parts.append(matrix.contiguous().view(torch.uint8).numpy())
        else:
            floats = matrix.float().contiguous().numpy()
            parts.append(floats if kind is Kind.F32 else quantize(floats, kind))
    return parts[0] if len(target.shape) == len(parts[0].shape) else np.stack(parts)


def _reordered(matrix: torch.Tensor, name: str, config: dict[str, Any]) -> torch.Tensor:
    """llama.cpp's ``llama`` rotates neighbours, transformers the two halves of a head."""
    if config["model_type"] != "mixtral" or not re.search(r"\.[qk]_proj\.weight$", name):
        return matrix
    heads = config["num_attention_heads" if ".q_proj" in name else "num_key_value_heads"]
    halves = matrix.reshape(heads, 2, matrix.shape[0] // heads // 2, -1)
    return halves.transpose(1, 2).reshape(matrix.shape)


# -------------------------------------------------------------------------------------- the header


def _describe(writer: Any, config: dict[str, Any], model: Path) -> None:
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or config
    writer.add_name(model.name)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config.get("num_local_experts") or config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if config["model_type"] == "qwen3_moe":
        if not config.get("norm_topk_prob"):
            raise ValueError("llama.cpp always normalises the top-k weights; this model does not")
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    _describe_tokenizer(writer, config, model)


def _describe_tokenizer(writer: Any, config: dict[str, Any], model: Path) -> None:
    """Byte-level BPE, which both reference models have."""
    tokenizer = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    special = {one["content"]: one["id"] for one in tokenizer["added_tokens"]}
    names = {number: text for text, number in {**vocabulary, **special}.items()}
    tokens = [names.get(i, f"<unused{i}>") for i in range(config["vocab_size"])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if text in special else NORMAL for text in tokens])
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)
