"""Tokens of one answer -> its text, as it comes, and its end.

Knows: detokenisation in context, stop strings, every way in which an answer ends by itself.
Does not know: how a token was picked, who else is answered, HTTP.

What a token adds to a text depends on its neighbours: a character may be spread over several
tokens, and a tokenizer of the SentencePiece kind drops the space before the very first word. The
text of an answer is therefore what stands after the prompt when both are decoded together (by
itself after a prompt that ends in half a character).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any

from understudy.batch import Ask, Delta, TokenLogprob
from understudy.core import UnderstudyError

HALF = "\ufffd"  # what decoders write for bytes that are no character, or none yet
LONGEST = 4  # bytes of a character in UTF-8; every token that is a part of one has at least one
CONTEXT = 5  # tokens at most that are decoded again with each new one


class Detokenizer:
    """Tokens -> text, one at a time: all that `add` gives, then `flush`, is the whole text.

    Half a character is kept back until its other half is there. Special tokens are left out of
    the text unless asked for; so is a token that the model has and the tokenizer has not.
    """

    def __init__(
        self, tokenizer: Any, before: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = special_ids(tokenizer) if skip_special_tokens else frozenset()
        self._context = self._end_of(before)
        self._shown = self._decode(self._context)  # of context and pending tokens, so far
        self._pending: list[int] = []

    def add(self, token: int) -> str:
        if not self._is_seen(token):
            return ""
        self._pending.append(token)
        new = self._new()
        if not new.endswith(HALF):
            return self._settle(new)
        if len(self._pending) < LONGEST:
            return ""
        # More tokens than a character has bytes: only the last one can be unfinished.
        return self._settle(new, kept=1)

    def flush(self) -> str:
        """The rest, with what will never be a character."""
        return self._settle(self._new())

    def _settle(self, new: str, kept: int = 0) -> str:
        # It must begin where a character does. A token without text is no context by itself.
        before = [] if new else self._context
        self._context, self._pending = (before + self._pending)[-CONTEXT:], []
        text = self._decode(self._context)
        self._shown = text[: len(text) - kept]
        return new[: len(new) - kept]

    def _new(self) -> str:
        text = self._decode(self._context + self._pending)
        if text.startswith(self._shown):
            return text[len(self._shown) :]
        # Tokens for single bytes: beside one that fits nothing, some decoders take back characters
        # that were whole. They have been sent; the new tokens are read by themselves.
        return self._decode(self._pending)

    def _end_of(self, before: Sequence[int]) -> list[int]:
        """What the first tokens are read after: not all of a long prompt."""
        seen = [t for t in before[-LONGEST * CONTEXT :] if self._is_seen(t)]
        ends = (seen[-length:] for length in range(CONTEXT, 0, -1))
        return next((end for end in ends if HALF not in self._decode(end)), [])

    def _is_seen(self, token: int) -> bool:
        if token in self._skipped:
            return False
        return self._tokenizer.convert_ids_to_tokens(token) is not None

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


class StopStrings:
    """Text as it comes -> text that is settled, until one of ``stops`` is complete.

    The first to be complete ends the text, the longest of those that are complete at once: so the
    end does not depend on how the text came in pieces. Kept back is only the longest ending that
    may still become a stop string.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        if not all(stops):
            raise UnderstudyError("stop: an empty string would end every answer at once")
        self._stops, self._include = tuple(stops), include
        self._held = ""
        self._immune = 0  # a stop string that is complete within so much of it does not count

    def feed(self, text: str, may_stop: bool = True) -> tuple[str, str | None]:
        """What is settled, and the stop string if there is one (then this was the last call)."""
        self._held += text
        if not may_stop:
            self._immune = len(self._held)
        found = min(self._matches(), default=None)
        if found is not None:
            end, start, stop = found
            return self._held[: end if self._include else start], stop
        return self._release(len(self._held) - self._begun()), None

    def finish(self) -> str:
        """No more text comes: what was kept back."""
        return self._release(len(self._held))

    def _matches(self) -> list[tuple[int, int, str]]:
        found = []
        for stop in self._stops:
            start = self._held.find(stop, max(0, self._immune - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        return found

    def _begun(self) -> int:
        lengths = (
            length
            for stop in self._stops
            for length in range(1, min(len(stop), len(self._held) + 1))
            if self._held.endswith(stop[:length])
        )
        return max(lengths, default=0)

    def _release(self, count: int) -> str:
        settled, self._held = self._held[:count], self._held[count:]
        self._immune = max(0, self._immune - count)
        return settled


class Answer:
    """One answer on its way out."""

    def __init__(self, tokenizer: Any, ask: Ask, eos_ids: Collection[int]) -> None:
        self._ask, self._eos_ids = ask, eos_ids
        self._detokenizer = Detokenizer(tokenizer, ask.prompt, ask.skip_special_tokens)
        self._stops = StopStrings(ask.stop, ask.include_stop)
        self._count = 0

    def add(self, picked: TokenLogprob, complete: bool = False) -> Delta:
        """The answer goes on with a token. ``complete``: nothing may follow (`Sampler.complete`).

        Tokens and their logprobs go out at once, also the one that ends the answer; text goes out
        when it is settled, so it may lag behind (`token_offsets` says whose it is). The text of an
        ending token, and a stop string, are left out unless the ask wants them in. Once the delta
        has ``finish``, it was the last.
        """
        self._count += 1
        ask, token = self._ask, picked.token
        delta = Delta(tokens=(token,), logprobs=() if ask.logprobs is None else (picked,))
        may_stop = self._count > ask.min_tokens
        is_end = may_stop and self._is_end(token)
        is_last = is_end or complete or self._count >= ask.max_new_tokens

        text = "" if is_end and not ask.include_stop else self._detokenizer.add(token)
        if is_last:
            text += self._detokenizer.flush()
        delta.text, stop = self._stops.feed(text, may_stop)
        if stop is not None:
            delta.finish, delta.stop_reason = "stop", stop
        elif is_last:
            delta.text += self._stops.finish()
            delta.finish = "stop" if is_end or complete else "length"
            if is_end and not self._is_eos(token):
                delta.stop_reason = token
        return delta

    def _is_end(self, token: int) -> bool:
        return self._is_eos(token) or token in self._ask.stop_token_ids

    def _is_eos(self, token: int) -> bool:
        return token in self._eos_ids and not self._ask.ignore_eos


# --------------------------------------------------------------------------------- about one token


@lru_cache(maxsize=8)
def special_ids(tokenizer: Any) -> frozenset[int]:
    """Tokens that are no text: ends of turns and their like."""
    added = tokenizer.added_tokens_decoder
    return frozenset(tokenizer.all_special_ids) | {t for t, what in added.items() if what.special}


@lru_cache(maxsize=2**16)
def token_bytes(tokenizer: Any, token: int) -> bytes:
    """What a token spells in the middle of a text, perhaps a part of a character: the ``bytes`` of
    OpenAI's logprobs. ``.decode(errors="replace")`` of it is their ``token``."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if piece is None:
        return b""
    if token in _added_ids(tokenizer):
        return str(piece).encode()
    text = _in_the_middle(tokenizer, token)
    if HALF not in text:
        return text.encode()
    if piece.startswith("<0x") and piece.endswith(">") and len(piece) == 6:
        return bytes([int(piece[3:5], 16)])
    letters = _byte_of_letter()
    if all(letter in letters for letter in piece):
        return bytes(letters[letter] for letter in piece)
    return text.encode()


def token_offsets(
    tokenizer: Any,
    tokens: Sequence[int],
    before: Sequence[int] = (),
    skip_special_tokens: bool = True,
) -> list[int]:
    """Where the text of each token begins: the ``text_offset`` of legacy completions. For ``echo``
    the tokens are those of prompt and answer; else ``before`` is the prompt."""
    detokenizer = Detokenizer(tokenizer, before, skip_special_tokens)
    offsets, place = [], 0
    for token in tokens:
        offsets.append(place)
        place += len(detokenizer.add(token))
    return offsets


def _in_the_middle(tokenizer: Any, token: int) -> str:
    """A decoder may drop the space in front of the first word: here another word is the first."""
    first = tokenizer.encode("a", add_special_tokens=False)
    start = tokenizer.decode(first, clean_up_tokenization_spaces=False)
    both = tokenizer.decode([*first, token], clean_up_tokenization_spaces=False)
    return str(both[len(start) :])


@lru_cache(maxsize=8)
def _added_ids(tokenizer: Any) -> frozenset[int]:
    return frozenset(tokenizer.added_tokens_decoder)


@lru_cache(maxsize=1)
def _byte_of_letter() -> dict[str, int]:
    """The letters that byte-level BPE has for bytes."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}
