"""One answer as far as it has come: deltas added up.

Knows: deltas, and how tokens and their logprobs are written for clients. Does not know: which
endpoint asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from understudy.batch import Delta, Report, TokenLogprob
from understudy.batch.text import Detokenizer, token_bytes
from understudy.serve.shapes import ChatLogprob, LegacyLogprobs, TopLogprob


@dataclass(slots=True)
class Collected:
    """``report``: there as soon as the answer is complete."""

    begun: bool = False
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    finish: str | None = None
    stop_reason: str | int | None = None
    report: Report | None = None

    def add(self, delta: Delta) -> None:
        self.begun = True
        self.text += delta.text
        self.tokens += delta.tokens
        self.logprobs += delta.logprobs
        self.prompt_logprobs += delta.prompt_logprobs or ()
        if delta.last:
            self.finish, self.stop_reason = delta.finish, delta.stop_reason
            self.report = delta.report


def spelled(tokenizer: Any, token: int) -> str:
    """The text of a token; where it is a part of a character, its bytes in OpenAI's notation, so
    that different tokens have different names."""
    raw = token_bytes(tokenizer, token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(tokenizer: Any, logprobs: Sequence[TokenLogprob]) -> list[ChatLogprob]:
    """Of a chat's answer."""
    return [
        ChatLogprob(
            token=spelled(tokenizer, entry.token),
            logprob=entry.logprob,
            bytes=list(token_bytes(tokenizer, entry.token)),
            top_logprobs=[_top(tokenizer, token, logprob) for token, logprob in entry.top],
        )
        for entry in logprobs
    ]


def _top(tokenizer: Any, token: int, logprob: float) -> TopLogprob:
    name = spelled(tokenizer, token)
    return TopLogprob(token=name, logprob=logprob, bytes=list(token_bytes(tokenizer, token)))


class Offsets:
    """Where the text of each token starts, in a text that grows token by token."""

    def __init__(self, tokenizer: Any, before: Sequence[int], skip_special_tokens: bool) -> None:
        self._detokenizer = Detokenizer(tokenizer, before, skip_special_tokens)
        self._length = 0

    def of(self, tokens: Sequence[int]) -> list[int]:
        starts = []
        for token in tokens:
            starts.append(self._length)
            self._length += len(self._detokenizer.add(token))
        return starts


def legacy_logprobs(
    tokenizer: Any,
    tokens: Sequence[int],
    logprobs: Sequence[TokenLogprob | None],
    offsets: list[int],
) -> LegacyLogprobs:
    """Of a completion."""
    return LegacyLogprobs(
        tokens=[spelled(tokenizer, token) for token in tokens],
        token_logprobs=[None if entry is None else entry.logprob for entry in logprobs],
        top_logprobs=[
            None if entry is None else _likeliest(tokenizer, entry) for entry in logprobs
        ],
        text_offset=offsets,
    )


def _likeliest(tokenizer: Any, entry: TokenLogprob) -> dict[str, float]:
    """The best ones, and the token itself: evaluators compare it with the best. Of two tokens with
    the same text the likelier counts, and the best come first."""
    told: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token, entry.logprob)):
        told.setdefault(spelled(tokenizer, token), logprob)
    return told
