"""Grammars that hold an answer to a form, by llguidance.

Knows: llguidance's compiler and matcher, JSON Schema by name, the model's vocabulary.
Does not know: sampling, HTTP, how tool calls are written (`tools`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from understudy.batch import Grammar
from understudy.core import UnderstudyError


class GrammarError(UnderstudyError):
    """A schema or grammar that cannot be used. One line; says what is wrong with it."""


class Grammars:
    """Compiles grammars for one tokenizer, and remembers the last few. Any thread may call it;
    a compilation takes milliseconds (hostile ones are cut off)."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Collection[int] = ()) -> None: ...
    def json_object(self) -> Grammar: ...
    def json_schema(self, schema: Mapping[str, Any] | bool, strict: bool = True) -> Grammar:
        """``strict``: an unsupported keyword is an error, else it is not enforced."""

    def regex(self, pattern: str) -> Grammar: ...
    def choice(self, choices: Sequence[str]) -> Grammar: ...
    def lark(self, text: str) -> Grammar: ...
