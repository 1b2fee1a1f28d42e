"""Grammars that hold an answer to a form, by llguidance.

Knows: llguidance's compiler and matcher, JSON Schema by name, the model's vocabulary.
Does not know: sampling, HTTP, how tool calls are written (`tools`).
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from understudy.batch import Grammar
from understudy.core import UnderstudyError

KEPT = 64  # compiled grammars that are remembered
MOST_CHOICES = 10_000  # at one place: an object of 2,500 optional properties, for example

# Between the tokens of JSON. A weak model that may write white space writes it for ever, and a
# strong one can do without.
JSON_SPACE = r"[ ]?"


class GrammarError(UnderstudyError):
    """A schema or grammar that cannot be used. One line; says what is wrong with it."""


class Grammars:
    """Compiles grammars for one tokenizer, and remembers the last few. Any thread may call it."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Collection[int] = ()) -> None:
        self._about = tokenizer, vocab_size, eos_ids
        self._made: Vocabulary | None = None
        self._lock = threading.Lock()
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()

    def json_object(self) -> Grammar:
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Mapping[str, Any] | bool, strict: bool = True) -> Grammar:
        """``strict``: a keyword that cannot be enforced is an error, else it is not enforced."""
        return self._grammar(LLMatcher.grammar_from_json_schema(_json(schema, strict)))

    def regex(self, pattern: str) -> Grammar:
        return self._grammar(LLMatcher.grammar_from_regex(pattern))

    def choice(self, choices: Sequence[str]) -> Grammar:
        if not choices or not all(choices):
            raise GrammarError("a choice needs texts to choose from, none of them empty")
        return self.lark("start: " + " | ".join(json.dumps(c, ensure_ascii=False) for c in choices))

    def lark(self, text: str) -> _Compiled:
        """llguidance's dialect of Lark."""
        return self._grammar(LLMatcher.grammar_from_lark(text))

    def after(self, triggers: Mapping[str, str], *, at_start: bool, once: bool) -> Grammar:
        """Free text, until one of ``triggers`` has been written; then its value, in Lark, follows.

        ``at_start``: only where the answer begins. ``once``: the answer ends after that, else text
        is free again. Text that is free costs nothing, and every token may be in it.
        """
        bodies = {trigger.encode(): self.lark(body) for trigger, body in triggers.items()}
        return _AfterTrigger(self._vocabulary, bodies, at_start, once)

    def marker(self, text: str) -> str:
        """``text`` in Lark: the special token that spells it, where there is one."""
        token = self._vocabulary.special(text)
        return json.dumps(text, ensure_ascii=False) if token is None else f"<[{token}]>"

    @property
    def _vocabulary(self) -> Vocabulary:
        """Made when first asked for: it takes a second, and not every tokenizer can do it."""
        with self._lock:
            if self._made is None:
                self._made = Vocabulary(*self._about)
            return self._made

    def _grammar(self, source: str) -> _Compiled:
        vocabulary = self._vocabulary
        with self._lock:
            if source in self._compiled:
                self._compiled.move_to_end(source)
                return _Compiled(vocabulary, self._compiled[source])
        first = vocabulary.compile(source)
        with self._lock:
            self._compiled[source] = first
            while len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        return _Compiled(vocabulary, first)


def json_rule(schema: Mapping[str, Any] | bool, strict: bool) -> str:
    """A JSON value of this schema, inside a grammar in Lark."""
    return f"%json {_json(schema, strict)}"


def _json(schema: Mapping[str, Any] | bool, strict: bool) -> str:
    if schema is False:
        raise GrammarError("the schema false allows no answer at all")
    options = {
        "whitespace_pattern": JSON_SPACE,
        "lenient": not strict,
        "coerce_one_of": not strict,
    }
    try:
        return json.dumps({**({} if schema is True else schema), "x-guidance": options})
    except (RecursionError, TypeError, ValueError) as error:
        raise GrammarError(f"the schema is no JSON: {one_line(str(error))}") from error


def one_line(message: str) -> str:
    """Of llguidance's complaints the part that is for the user."""
    message = message.split("<non-verbose/>")[0].split("<state>")[0]
    if message.startswith("NoExtension"):
        return "no text satisfies it"
    return " ".join(message.split())[:300]


# ---------------------------------------------------------------------------------- the vocabulary


class Vocabulary:
    """The model's tokens as llguidance sees them. A model may have more logits than its tokenizer
    has tokens: the rest is never allowed."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Collection[int]) -> None:
        inner = _inner(tokenizer)
        known = inner.get_vocab_size(with_added_tokens=True)
        self.ends = frozenset(t for t in eos_ids if 0 <= t < known)
        self._never: int | None = None
        if not self.ends:  # llguidance wants one: a new token, which is never allowed
            inner.add_special_tokens(["<|no end|>"])
            self._never = inner.token_to_id("<|no end|>")
        size = max(vocab_size, inner.get_vocab_size(with_added_tokens=True))
        ends = sorted(self.ends) or [inner.token_to_id("<|no end|>")]
        try:
            self.tokens = LLTokenizer(inner.to_str(), n_vocab=size, eos_token=ends)
        except ValueError as error:
            raise GrammarError(
                f"JSON, tools and grammars do not work with this model's tokenizer: "
                f"{one_line(str(error))}"
            ) from error

    def compile(self, source: str) -> LLMatcher:
        matcher = LLMatcher(
            self.tokens,
            source,
            log_level=0,
            limits=LLParserLimits(verbose_errors=False, max_items_in_row=MOST_CHOICES),
        )
        if not matcher.is_error():
            probe = matcher.deep_copy()  # some faults show only when the first token is asked for
            probe.compute_bitmask()
            matcher = probe if probe.is_error() else matcher
        if matcher.is_error():
            raise GrammarError(
                f"the grammar or schema cannot be used: {one_line(matcher.get_error())}"
            )
        return matcher

    def allowed(self, matcher: LLMatcher, size: int) -> torch.Tensor:
        """[size] bool: what may come next."""
        words = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.unpackbits(words, count=size, bitorder="little")
        if self._never is not None and self._never < size:
            bits[self._never] = 0
        return torch.from_numpy(bits).bool()

    def special(self, text: str) -> int | None:
        """The one special token that is spelled like this."""
        ids = self.tokens.tokenize_str(text, parse_special=True)
        return ids[0] if len(ids) == 1 and self.tokens.is_special_token(ids[0]) else None


def _inner(tokenizer: Any) -> Any:
    """A copy of the tokenizers library's own tokenizer, without padding and truncation."""
    from tokenizers import Tokenizer

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise GrammarError(
            "this model's tokenizer has no tokenizer.json; JSON, tools and grammars need one"
        )
    inner = Tokenizer.from_str(backend.to_str())
    inner.no_padding()
    inner.no_truncation()
    return inner


# -------------------------------------------------------------------------------------- the answer


class _Compiled:
    """A grammar that holds from the first token on."""

    def __init__(self, vocabulary: Vocabulary, first: LLMatcher) -> None:
        self._vocabulary, self._first = vocabulary, first

    def begin(self) -> _Following:
        return _Following(self._vocabulary, self._first.deep_copy())


class _Following:
    def __init__(self, vocabulary: Vocabulary, matcher: LLMatcher) -> None:
        self._vocabulary, self._matcher = vocabulary, matcher
        self._ended = False

    def constrain(self, scores: torch.Tensor) -> None:
        allowed = self._vocabulary.allowed(self._matcher, len(scores))
        self._require_sound()
        scores.masked_fill_(~allowed.to(scores.device), -torch.inf)

    def accept(self, token: int) -> None:
        if token in self._vocabulary.ends:
            self._ended = True
            return
        self._matcher.consume_token(token)
        self._require_sound()

    @property
    def complete(self) -> bool:
        return self._ended or self._matcher.is_stopped()

    def goes_on(self, text: bytes) -> bool:
        """Take ``text`` as written, if the grammar allows it."""
        tokens = self._vocabulary.tokens.tokenize_bytes(text)
        if self._matcher.validate_tokens(tokens) < len(tokens):
            return False
        self._matcher.consume_tokens(tokens)
        return True

    def _require_sound(self) -> None:
        if self._matcher.is_error():
            raise GrammarError(
                f"the answer cannot be held to its grammar: {one_line(self._matcher.get_error())}"
            )


class _AfterTrigger:
    """See `Grammars.after`."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        bodies: Mapping[bytes, _Compiled],
        at_start: bool,
        once: bool,
    ) -> None:
        self.vocabulary, self.bodies = vocabulary, bodies
        self.at_start, self.once = at_start, once

    def begin(self) -> _Watching:
        return _Watching(self)


class _Watching:
    """Reads free text until a trigger, then follows what comes after it."""

    def __init__(self, grammar: _AfterTrigger) -> None:
        self._grammar = grammar
        self._body: _Following | None = None
        self._read = b""  # the end of it, in which a trigger may have begun
        self._watching = True

    def constrain(self, scores: torch.Tensor) -> None:
        if self._body is not None:
            self._body.constrain(scores)

    def accept(self, token: int) -> None:
        if self._body is not None:
            self._body.accept(token)
        elif self._watching:
            self._read += self._grammar.vocabulary.tokens.decode_bytes([token])
            if self._grammar.at_start:
                self._look_at_start()
            else:
                self._look()
        if self.complete and not self._grammar.once:
            self._body, self._read = None, b""

    @property
    def complete(self) -> bool:
        return self._body is not None and self._body.complete

    def _look(self) -> None:
        found = [(self._read.find(t), t) for t in self._grammar.bodies if t in self._read]
        if found:
            place, trigger = min(found)
            self._follow(trigger, self._read[place + len(trigger) :])
        longest = max(map(len, self._grammar.bodies))
        self._read = self._read[max(0, len(self._read) - longest + 1) :]

    def _look_at_start(self) -> None:
        begun = self._read.lstrip()
        for trigger in self._grammar.bodies:
            if begun.startswith(trigger):
                self._watching = False
                return self._follow(trigger, begun[len(trigger) :])
        self._watching = any(trigger.startswith(begun) for trigger in self._grammar.bodies)
        return None

    def _follow(self, trigger: bytes, beyond: bytes) -> None:
        """A token may reach beyond the trigger; if it breaks the body's form, text stays free."""
        body = self._grammar.bodies[trigger].begin()
        if body.goes_on(beyond):
            self._body = body
