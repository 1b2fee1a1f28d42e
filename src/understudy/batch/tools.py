"""Tool calls: how a model is told of tools, held to their form, and heard when it calls one.

Knows: the forms in which model families write calls (`FORMS`), chat templates, OpenAI's shape of
tools, choices and streamed calls. Does not know: HTTP, how a grammar is compiled, or what a tool does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from understudy.batch import Grammar
from understudy.batch.grammar import Grammars


@dataclass(frozen=True, slots=True)
class Content:
    """Text that is no tool call."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of call number ``index``. Its first piece has ``id`` and ``name``; the ``arguments``
    of all pieces, joined, are the JSON text that the model wrote."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Named:
    """The choice of one tool by its name."""

    name: str


ToolChoice = Literal["none", "auto", "required"] | Named
Tool = Mapping[str, Any]  # OpenAI's: {"type": "function", "function": {"name", "parameters", ..}}
Message = Mapping[str, Any]  # OpenAI's; ``content`` is a string or None (parts are joined before)


class ToolParser:
    """One answer's text on its way in -> content and calls on their way out."""

    def feed(self, text: str) -> list[Content | ToolCallDelta]: ...

    def finish(self) -> list[Content | ToolCallDelta]:
        """The answer is over: what was held back."""

    @property
    def calls(self) -> int:
        """Calls begun so far."""


class ToolFormat:
    """The form of tool calls that one model understands; shared by all requests."""

    skip_special_tokens: bool  # what `Ask` must have so that the markers of calls stay in the text

    @classmethod
    def of(cls, name: str, tokenizer: Any) -> ToolFormat:
        """``name``: hermes, json, mistral, or auto: by the look of the chat template."""

    def render(
        self, tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool] = (), **kwargs: Any
    ) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer. No tools: an ordinary
        one. ``kwargs``: for `apply_chat_template` (add_generation_prompt is True unless given)."""

    def grammar(
        self, grammars: Grammars, tools: Sequence[Tool], choice: ToolChoice, parallel: bool = True
    ) -> Grammar | None:
        """What holds an answer to the form. ``parallel``: more than one call may be made. "auto":
        text is free, a call's body is not. "none": ``None``. Raises `GrammarError`."""

    def parser(self, tools: Sequence[Tool]) -> ToolParser: ...
