"""Tiny random Mixture-of-Experts checkpoints, made on the spot by transformers itself."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

# Tiny models: a second thread costs more than it brings, and beside other work it costs minutes
# (threads that wait spin). Set before torch is imported; commands that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

VOCABULARY = 96
FAMILIES = ("mixtral", "qwen3_moe")
DTYPES = ("float32", "bfloat16")

Tiny = Callable[..., Path]


def _config(family: str) -> Any:
    import transformers

    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.15,  # enough for logits that tell tokens apart
        "bos_token_id": 1,
        "eos_token_id": None,  # a random model must not stop by chance
        "pad_token_id": 0,
    }
    if family == "mixtral":
        return transformers.MixtralConfig(
            **common, num_hidden_layers=3, intermediate_size=40, num_local_experts=8
        )
    return transformers.Qwen3MoeConfig(
        **common, num_hidden_layers=4, intermediate_size=64, moe_intermediate_size=24, num_experts=8
    )


def pytest_configure(config: pytest.Config) -> None:
    """Triton's kernels run on its interpreter, and that must be known before anybody imports
    triton. Tests that need an accelerator need compiled ones: `pytest tests/gpu`, by itself."""
    alone = config.args and all("tests/gpu" in argument for argument in config.args)
    if not alone:
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _python_handles_sigint() -> Iterator[None]:
    """A shell's background job starts with SIGINT ignored; the tests of Ctrl-C need it heard."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """``tiny(family, dtype)``: the folder of a checkpoint, made once. 8 experts, top-2, no EOS."""

    @cache
    def make(family: str, dtype: str) -> Path:
        import torch
        from transformers import AutoModelForCausalLM

        torch.manual_seed(len(family))
        model = AutoModelForCausalLM.from_config(_config(family)).to(getattr(torch, dtype))
        folder = tmp_path_factory.mktemp(f"{family}-{dtype}")
        model.save_pretrained(folder)
        return folder

    return lambda family="mixtral", dtype="float32": make(family, dtype)


@pytest.fixture
def tokens() -> Callable[..., Any]:
    """``tokens(n, ...)``: a batch of seeded random prompts of these lengths, padded on the left."""

    def make(*lengths: int, seed: int = 0) -> dict[str, Any]:
        import torch

        dice = torch.Generator().manual_seed(seed)
        width = max(lengths)
        ids = torch.randint(3, VOCABULARY, (len(lengths), width), generator=dice)
        mask = torch.ones_like(ids)
        for row, length in enumerate(lengths):
            ids[row, : width - length] = 0
            mask[row, : width - length] = 0
        return {"input_ids": ids, "attention_mask": mask}

    return make


@pytest.fixture(scope="session")
def speaking_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral of 4 x 32 experts with a tokenizer of single bytes. Half of its bytes hold the
    dense part, 512 tokens of context and a few experts."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    bytes_as_letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {s: i for i, s in enumerate(["<pad>", "<s>", "</s>", *bytes_as_letters])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    torch.manual_seed(1)
    config = transformers.MixtralConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=32,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
        initializer_range=0.15,  # enough for logits that tell tokens apart
        bos_token_id=1,
        eos_token_id=None,  # a random model must not stop by chance
        pad_token_id=0,
    )
    folder = tmp_path_factory.mktemp("speaking-model")
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
