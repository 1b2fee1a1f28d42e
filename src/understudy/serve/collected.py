"""One answer as far as it has come: deltas added up.

Knows: deltas, and how tokens and their logprobs are written for clients. Does not know: which
endpoint asks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from understudy.batch import Delta, Report, TokenLogprob
from understudy.batch.text import Detokenizer, token_bytes
from understudy.serve.shapes import ChatLogprob, LegacyLogprobs, TopLogprob

REMEMBERED = 1 << 16  # tokens


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


class Spelling:
    """How tokens are written for clients. Remembered: a token with its twenty alternatives would
    take the tokenizer milliseconds, every step again."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.of = lru_cache(REMEMBERED)(self._of)

    def _of(self, token: int) -> tuple[str, bytes]:
        """The text of a token; where it is a part of a character, its bytes in OpenAI's notation,
        so that different tokens have different names."""
        raw = token_bytes(self.tokenizer, token)
        try:
            return raw.decode(), raw
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), raw

    def name(self, token: int) -> str:
        return self.of(token)[0]


def chat_logprobs(spelling: Spelling, logprobs: Sequence[TokenLogprob]) -> list[ChatLogprob]:
    """Of a chat's answer."""
    told = []
    for entry in logprobs:
        name, raw = spelling.of(entry.token)
        top = [_top(spelling, token, logprob) for token, logprob in entry.top]
        told.append(
            ChatLogprob(token=name, logprob=entry.logprob, bytes=list(raw), top_logprobs=top)
        )
    return told


def _top(spelling: Spelling, token: int, logprob: float) -> TopLogprob:
    name, raw = spelling.of(token)
    return TopLogprob(token=name, logprob=logprob, bytes=list(raw))


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
    spelling: Spelling,
    tokens: Sequence[int],
    logprobs: Sequence[TokenLogprob | None],
    offsets: list[int],
) -> LegacyLogprobs:
    """Of a completion."""
    return LegacyLogprobs(
        tokens=[spelling.name(token) for token in tokens],
        token_logprobs=[None if entry is None else entry.logprob for entry in logprobs],
        top_logprobs=[None if entry is None else _likeliest(spelling, entry) for entry in logprobs],
        text_offset=offsets,
    )


def _likeliest(spelling: Spelling, entry: TokenLogprob) -> dict[str, float]:
    """The best ones, and the token itself: evaluators compare it with the best. Of two tokens with
    the same text the likelier counts, and the best come first."""
    told: dict[str, float] = {}
    for token, logprob in (*entry.top, (entry.token, entry.logprob)):
        told.setdefault(spelling.name(token), logprob)
    return told
