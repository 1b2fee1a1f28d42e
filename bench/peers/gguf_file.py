"""The same weights as a GGUF file, for llama.cpp: written with the `gguf` package, once per format.

Knows: how the two reference families are named in GGUF. Does not know: how llama.cpp is run.

bf16 keeps every bit. q8_0 and q4_0 quantise all matrices, as llama.cpp's own tool does, except that
embeddings stay at q8_0 in a q4_0 file (it would use q6_k) and routers at fp32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

ARCHITECTURES = {"mixtral": "llama", "qwen3_moe": "qwen3moe"}

# name in transformers -> name in GGUF, inside a layer
DENSE = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}  # fmt: skip
EXPERTS = {
    "gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps",
    "w1": "ffn_gate_exps", "w3": "ffn_up_exps", "w2": "ffn_down_exps",
}  # fmt: skip


def gguf_of(model: Path, format: str) -> Path:
    """The GGUF of ``model`` in ``format`` (bf16, q8_0, q4_0), written now if there is none."""
    file = model.with_name(f"{model.name}-{format}.gguf")
    if not file.exists():
        partial = file.with_suffix(".partial")
        _write(model, format, partial)
        partial.rename(file)
    return file


def _write(model: Path, format: str, file: Path) -> None:
    import gguf

    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(file, ARCHITECTURES[config["model_type"]])
    _describe(writer, config)
    _vocabulary(writer, model, config)
    for name, tensor in _tensors(model, config):
        data, kind = _encoded(gguf, name, tensor, format)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, c: dict[str, Any]) -> None:
    width = c.get("moe_intermediate_size") or c["intermediate_size"]
    head = c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_expert_feed_forward_length(width)
    writer.add_head_count(c["num_attention_heads"])
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(c["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_expert_count(c.get("num_local_experts") or c["num_experts"])
    writer.add_expert_used_count(c["num_experts_per_tok"])
    writer.add_vocab_size(c["vocab_size"])


def _vocabulary(writer: Any, model: Path, config: dict[str, Any]) -> None:
    """Enough of a tokenizer to load: benchmarks speak in token ids."""
    found = json.loads((model / "tokenizer.json").read_text())
    names = {i: name for name, i in found["model"]["vocab"].items()}
    names |= {one["id"]: one["content"] for one in found.get("added_tokens", ())}
    tokens = [names.get(i, f"<unused{i}>") for i in range(config["vocab_size"])]
    merges = [m if isinstance(m, str) else " ".join(m) for m in found["model"].get("merges", ())]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(tokens))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config.get("bos_token_id") or 0)
    writer.add_eos_token_id(config.get("eos_token_id") or 0)


def _tensors(model: Path, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    weights = _Weights(model)
    yield "token_embd.weight", weights["model.embed_tokens.weight"]
    yield "output_norm.weight", weights["model.norm.weight"]
    if "lm_head.weight" in weights and not config.get("tie_word_embeddings"):
        yield "output.weight", weights["lm_head.weight"]
    for layer in range(config["num_hidden_layers"]):
        yield from _layer(weights, layer, config)


def _layer(weights: _Weights, layer: int, config: dict[str, Any]) -> Iterator[Any]:
    start = f"model.layers.{layer}."
    for name, short in DENSE.items():
        if (full := f"{start}{name}.weight") in weights:
            tensor = weights[full]
            if config["model_type"] == "mixtral" and short in ("attn_q", "attn_k"):
                tensor = _interleaved(tensor, config, short)
            yield f"blk.{layer}.{short}.weight", tensor
    count = config.get("num_local_experts") or config["num_experts"]
    for room in ("mlp", "block_sparse_moe"):
        for name, short in EXPERTS.items():
            each = [f"{start}{room}.experts.{e}.{name}.weight" for e in range(count)]
            if each[0] in weights:
                yield f"blk.{layer}.{short}.weight", torch.stack([weights[n] for n in each])


def _interleaved(w: torch.Tensor, c: dict[str, Any], which: str) -> torch.Tensor:
    """llama.cpp turns pairs of neighbours in this architecture, transformers the two halves."""
    heads = c["num_attention_heads" if which == "attn_q" else "num_key_value_heads"]
    rows = w.shape[0] // heads
    return w.view(heads, 2, rows // 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


class _Weights:
    """All tensors of a checkpoint by name."""

    def __init__(self, model: Path) -> None:
        self._files = [safe_open(f, framework="pt") for f in sorted(model.glob("*.safetensors"))]
        self._where = {name: f for f in self._files for name in f.keys()}  # noqa: SIM118

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._where[name].get_tensor(name)
        return tensor


def _encoded(gguf: Any, name: str, tensor: torch.Tensor, format: str) -> tuple[np.ndarray, Any]:
    types = gguf.GGMLQuantizationType
    if tensor.ndim == 1 or "ffn_gate_inp" in name:
        return tensor.float().numpy(), types.F32
    if format == "bf16":
        return tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy(), types.BF16
    embedding = name in ("token_embd.weight", "output.weight")
    kind = types.Q8_0 if format == "q8_0" or embedding else types.Q4_0
    return gguf.quants.quantize(tensor.float().numpy(), kind), kind
