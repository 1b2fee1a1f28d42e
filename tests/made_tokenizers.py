"""Small tokenizers of every kind that models have, made on the spot, and that of `models/fine`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

FINE = Path(__file__).parents[1] / "models" / "fine"
KINDS = ("fine", "byte_level", "unigram", "byte_fallback", "wordpiece")
TEXT = [
    "the quick brown fox jumps over the lazy dog, and then it sleeps; it's 42 o'clock.",
    'a list: {"name": "value", "numbers": [1, 2, 3]} and more words, more tokens, more text',
    "überall wäre schön, déjà vu, naïve café",
]
SPECIAL = ["<s>", "</s>", "<unk>"]


@cache
def tokenizer_of(kind: str) -> Any:
    if kind == "fine":
        return AutoTokenizer.from_pretrained(FINE, local_files_only=True)
    inner = {
        "byte_level": _byte_level,
        "unigram": _unigram,
        "byte_fallback": _byte_fallback,
        "wordpiece": _wordpiece,
    }[kind]()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _byte_level() -> Tokenizer:
    """As GPT-2, Qwen and Llama 3: any token may hold parts of characters."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXT, trainer)
    return inner


def _unigram() -> Tokenizer:
    """As T5 and its kin: a space belongs to the word after it, the first one is dropped."""
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    inner.train_from_iterator(TEXT, trainer)
    return inner


def _byte_fallback() -> Tokenizer:
    """As Llama 2 and Mistral: what has no token is spelled in tokens for single bytes."""
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    words = sorted({"▁" + w for line in TEXT for w in line.split() if w.isascii()})
    letters = sorted({c for line in TEXT for c in line if c.isascii()} | {"▁"})
    pieces = list(dict.fromkeys([*SPECIAL, *spelled, *letters, *words]))
    inner = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.add_special_tokens(SPECIAL)
    return inner


def _wordpiece() -> Tokenizer:
    """As BERT: spaces are made by the decoder."""
    inner = Tokenizer(models.WordPiece(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL, show_progress=False)
    inner.train_from_iterator(TEXT, trainer)
    return inner
