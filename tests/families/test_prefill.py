"""A long prompt is prefilled in chunks only where that gives the same answer: what Understudy
generates from it equals what transformers generates without chunks, in every family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import configs

import understudy
from understudy.families import families

# Recurrent and exotic caches, where chunks are known to go wrong, and three ordinary families.
FAMILIES = ("jamba", "minimax", "deepseek_v2", "qwen3_next", "mixtral", "qwen3_moe", "gpt_oss")


@pytest.mark.parametrize("family", FAMILIES)
def test_long_prompts_equal_unchunked_transformers(family: str, tmp_path: Path) -> None:
    if family not in families():
        pytest.skip(f"the installed transformers has no {family}")
    configs.build(family, tmp_path)
    ids = torch.randint(3, 30, (1, 21), generator=torch.Generator().manual_seed(1))
    ask = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False,
        "return_dict_in_generate": True, "output_logits": True, "pad_token_id": 0,
        "eos_token_id": None,
    }  # fmt: skip
    expected = torch.cat(configs.load(family, tmp_path).generate(ids, **ask).logits)
    with understudy.load(tmp_path, slots=3, dtype="float32", prefill_chunk_size=8) as model:
        got = torch.cat(model.generate(ids, **ask).logits)
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_what_is_given_up_is_said(tmp_path: Path) -> None:
    configs.build("jamba", tmp_path)
    said: list[str] = []
    with understudy.load(tmp_path, slots=3, on_status=said.append) as model:
        assert model.understudy.policies["prefill_chunk_size"] is None
    assert any("read whole" in line for line in said)
