"""What is asked of a model on a device, pretended or real: tiny models, and their answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import understudy

PROMPT = (5, 17, 3, 44)
CONTEXT = 32


def small(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A checkpoint for kernels that are interpreted: 2 layers of 4 experts, top-2."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        num_experts_per_tok=2, num_experts=4, num_hidden_layers=2, intermediate_size=32,
        moe_intermediate_size=16, max_position_embeddings=64, eos_token_id=None, pad_token_id=0,
        initializer_range=0.15,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    return folder


def loaded(source: Path, memory: str = "1GiB", **options: Any) -> Any:
    return understudy.load(source, memory, max_context=CONTEXT, **options)


def say(model: Any, steps: int = 3, prompt: Sequence[int] = PROMPT) -> torch.Tensor:
    """[steps, vocabulary] logits of a greedy answer, as the engine would ask for it."""
    ids = torch.tensor([prompt], device=model.device)
    settings: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": steps, "do_sample": False,
        "return_dict_in_generate": True, "output_logits": True,
    }  # fmt: skip
    if model._captured is None:
        out = model.generate(ids, **settings)
    else:
        with model._captured.lend() as kept:
            out = model.generate(ids, past_key_values=kept, disable_compile=True, **settings)
    return torch.stack([step[0] for step in out.logits]).cpu()


class Plain:
    """What `Swiglu` computes, one pair after the other, by torch: sooner done than Triton's
    interpreter does it. Launched like a kernel, because it reads what slots hold."""

    def __init__(
        self, device: Any, slab: Any, format: str, dtype: torch.dtype, arena: torch.Tensor,
        slot_bytes: int, pairs: int, **more: Any,
    ) -> None:  # fmt: skip
        self.device, self.slab, self.arena, self.slot_bytes = device, slab, arena, slot_bytes

    def few(self, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        into = x.new_empty(*slots.shape, x.shape[1])
        self.device.launch(lambda grid, into: into.zero_(), (1,), into)
        self.pairs(x, slots, into)
        return self.sum(into, weights)

    def pairs(self, x: torch.Tensor, slots: torch.Tensor, into: torch.Tensor) -> None:
        self.device.launch(self._pairs, (1,), x, slots, into)

    many = pairs

    def sum(self, into: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return (into * weights.unsqueeze(-1)).sum(1).to(into.dtype)

    def _pairs(self, grid: Any, x: torch.Tensor, slots: torch.Tensor, into: torch.Tensor) -> None:
        slot_memory = self.arena.view(-1, self.slot_bytes)
        for token, row in enumerate(slots.tolist()):
            for rank, slot in enumerate(row):
                if slot >= 0:
                    weights = self.slab.views(slot_memory[slot])
                    gate, up = (weights["gate_up_proj"][0] @ x[token]).chunk(2)
                    h = torch.nn.functional.silu(gate) * up
                    into[token, rank] = weights["down_proj"][0] @ h
