"""A checkpoint for the pages: tiny, random, and able to read and write text."""

from __future__ import annotations

from pathlib import Path

import pytest


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
