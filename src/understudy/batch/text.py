"""Tokens of one answer -> its text, as it comes, and its end.

Knows: detokenisation in context, stop strings, every way an answer ends by itself.
Does not know: how a token was picked, who else is answered, HTTP.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from understudy.batch import Ask, Delta, TokenLogprob


class Detokenizer:
    """Tokens -> text, one at a time; ``"".join(add(t) for t in tokens) + flush()`` is the whole."""

    def __init__(
        self, tokenizer: Any, before: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None: ...
    def add(self, token: int) -> str: ...
    def flush(self) -> str: ...


class Answer:
    """Text, stop strings and the end of one answer."""

    def __init__(self, tokenizer: Any, ask: Ask, eos_ids: Collection[int]) -> None: ...
    def add(self, picked: TokenLogprob, complete: bool = False) -> Delta:
        """``complete``: `Sampler.complete`. Tokens and logprobs come at once, text when it is
        settled. ``delta.finish`` is set on the last one."""


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """What a token spells in the middle of a text (a part of a character perhaps): the ``bytes``
    of OpenAI's logprobs; ``.decode(errors="replace")`` is its ``token``."""


def token_offsets(tokenizer: Any, tokens: Sequence[int], before: Sequence[int] = ()) -> list[int]:
    """Where each token's text starts: the ``text_offset`` of legacy completions."""
