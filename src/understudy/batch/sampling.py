"""Logits of one position -> the next token of one answer.

Knows: transformers' logits processors, OpenAI's and vLLM's meaning of each setting, randomness.
Does not know: the batch, text, what a grammar says.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor

from understudy.batch import Ask, TokenLogprob
from understudy.core import UnderstudyError


class NoToken(UnderstudyError):
    """No token can be picked: the scores are no numbers, or nothing is allowed."""


class Sampler:
    """Picks the tokens of one answer. Its randomness is its own."""

    def __init__(self, ask: Ask, vocab_size: int, eos_ids: Collection[int]) -> None: ...
    def pick(self, logits: Tensor, answer: Sequence[int]) -> TokenLogprob:
        """``logits`` [V] float32, left as they are; ``answer``: the tokens picked before. The
        logprob is NaN where the ask wants none."""

    @property
    def complete(self) -> bool:
        """The grammar lets nothing but the end follow: the answer is over."""


def logprobs_of(logits: Tensor, tokens: Sequence[int], top: int) -> tuple[TokenLogprob, ...]:
    """About ``tokens`` [n] by ``logits`` [n, V], row by row; in slices, so memory stays small."""
