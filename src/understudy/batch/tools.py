"""Tool calls: how a model is told of tools, held to their form, and heard when it calls one.

Knows: chat templates, OpenAI's shape of tools and choices; which form of calls a model knows.
Does not know: HTTP, how a grammar is compiled, what a tool does.

A model whose chat template shows tools is told of them by its template. Any other is told in words
of ours, in the form that most models were taught (Hermes).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from understudy.batch import Grammar
from understudy.batch.grammar import GrammarError, Grammars
from understudy.batch.text import special_ids
from understudy.batch.toolforms import FORMS, Form, Rules
from understudy.batch.toolparser import Content, ToolCallDelta, ToolParser
from understudy.core import UnknownName

__all__ = ["Content", "Named", "ToolCallDelta", "ToolChoice", "ToolFormat", "ToolParser"]


@dataclass(frozen=True, slots=True)
class Named:
    """The choice of one tool by its name."""

    name: str


ToolChoice = Literal["none", "auto", "required"] | Named
Tool = Mapping[str, Any]  # OpenAI's: {"type": "function", "function": {"name", "parameters", ..}}
Message = Mapping[str, Any]  # OpenAI's; ``content`` is a string or None (parts are joined before)

IN_WORDS = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments in this form:
{example}"""


class ToolFormat:
    """The form of tool calls that one model understands; shared by all requests. ``native``: its
    chat template shows tools. ``skip_special_tokens``: what an `Ask` with tools must have, so that
    the markers of calls stay in the text."""

    def __init__(
        self, form: Form, *, native: bool, knows_system: bool, skip_special_tokens: bool
    ) -> None:
        self.form, self.native, self._knows_system = form, native, knows_system
        self.skip_special_tokens = skip_special_tokens

    @classmethod
    def of(cls, name: str, tokenizer: Any, chat_template: str | None = None) -> ToolFormat:
        """``name``: hermes, json, mistral, or auto: by the look of the chat template.
        ``chat_template``: in place of the tokenizer's own."""
        require_form(name)
        template = _Template(tokenizer, chat_template)
        shows = template.shows_tools()
        found = FORMS.get(name) or (template.form() if shows else None)
        form = found or FORMS["hermes"]
        special = tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))
        return cls(
            form,
            native=shows and found is not None,  # what it shows must be what is understood here
            knows_system=template.knows_system(),
            skip_special_tokens=form.open not in special and form.last not in special,
        )

    def render(
        self, tokenizer: Any, messages: Sequence[Message], tools: Sequence[Tool] = (), **kwargs: Any
    ) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer. No tools: an ordinary
        one. ``kwargs``: for `apply_chat_template` (add_generation_prompt is True unless given)."""
        told = [_with_objects(message) for message in messages]
        if not self.native:
            told = self._in_plain_turns(told)
            told = self._told_in_words(told, tools) if tools else told
        kwargs = {"add_generation_prompt": True} | kwargs
        if tools and self.native:
            kwargs["tools"] = [dict(tool) for tool in tools]
        ids = tokenizer.apply_chat_template(told, tokenize=True, return_dict=False, **kwargs)
        return [int(i) for i in ids]

    def grammar(
        self, grammars: Grammars, tools: Sequence[Tool], choice: ToolChoice, parallel: bool = True
    ) -> Grammar | None:
        """What holds an answer to the form. ``parallel``: more than one call may be made. "auto":
        text is free, a call's body is not. "none": ``None``. Raises `GrammarError`."""
        functions = [tool["function"] for tool in tools]
        if choice == "none":
            return None
        if isinstance(choice, Named):
            functions = [f for f in functions if f["name"] == choice.name]
            if not functions:
                raise GrammarError(f"tool_choice: there is no tool {choice.name!r}")
            parallel = False
        rules = Rules(self.form, functions, grammars.marker, parallel)
        if choice != "auto":
            return grammars.lark(rules.whole())
        return grammars.after(
            rules.after_triggers(), at_start=not self.form.open, once=not parallel
        )

    def parser(self, tools: Sequence[Tool]) -> ToolParser:
        return ToolParser(self.form, [tool["function"]["name"] for tool in tools])

    def _in_plain_turns(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Calls and results of the past, for a template that has no place for them."""
        plain: list[dict[str, Any]] = []
        after_result = False
        for message in messages:
            calls = [call["function"] for call in message.pop("tool_calls", None) or ()]
            if calls:
                said = [message["content"], self.form.written(calls)]
                message["content"] = "\n".join(filter(None, said))
            is_result = message["role"] == "tool"
            if is_result:
                result = f"<tool_response>\n{message['content']}\n</tool_response>"
                message = {"role": "user", "content": result}
            if is_result and after_result:
                plain[-1]["content"] += "\n" + message["content"]
            else:
                plain.append(message)
            after_result = is_result
        return plain

    def _told_in_words(
        self, messages: list[dict[str, Any]], tools: Sequence[Tool]
    ) -> list[dict[str, Any]]:
        shown = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
        words = IN_WORDS.format(tools=shown, example=self.form.example)
        first = messages[0] if messages else {}
        if first.get("role") == "system":
            return [first | {"content": f"{first['content']}\n\n{words}"}, *messages[1:]]
        if self._knows_system:
            return [{"role": "system", "content": words}, *messages]
        for i, message in enumerate(messages):
            if message["role"] == "user":
                message = message | {"content": f"{words}\n\n{message['content']}"}
                return [*messages[:i], message, *messages[i + 1 :]]
        return [{"role": "user", "content": words}, *messages]


def _with_objects(message: Message) -> dict[str, Any]:
    """Templates want the arguments of calls as an object, where OpenAI has them as its text; and
    content that is a string."""
    message = dict(message)
    message["content"] = message.get("content") or ""
    if message.get("tool_calls"):
        message["tool_calls"] = [
            {**call, "function": {**call["function"], "arguments": _object(call["function"])}}
            for call in message["tool_calls"]
        ]
    return message


def _object(function: Mapping[str, Any]) -> Any:
    arguments = function.get("arguments") or {}
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments  # the client's own text: the model is shown what it was


def require_form(name: str) -> None:
    """``name`` is one that `ToolFormat.of` knows."""
    if name != "auto" and name not in FORMS:
        raise UnknownName(
            f"unknown form of tool calls {name!r}; --tool-call-parser is auto, {', '.join(FORMS)}"
        )


class _Template:
    """What a chat template can do, found out by trying."""

    def __init__(self, tokenizer: Any, chat_template: str | None) -> None:
        self._tokenizer, self._own = tokenizer, chat_template

    def shows_tools(self) -> bool:
        probe = {"name": "probe", "description": "probe", "parameters": {"type": "object"}}
        tools = [{"type": "function", "function": probe}]
        with_tools = self._render([("user", "Hello")], tools=tools)
        return with_tools is not None and with_tools != self._render([("user", "Hello")])

    def knows_system(self) -> bool:
        """It has such messages, and they look otherwise than a user's."""
        as_system = self._render([("system", "Be brief."), ("user", "Hello")])
        as_user = self._render([("user", "Be brief."), ("user", "Hello")])
        return as_system is not None and "Be brief." in as_system and as_system != as_user

    def form(self) -> Form | None:
        """Of the calls that it tells the model to write."""
        text = self._own or self._tokenizer.get_chat_template(tools=[{}])
        has_json = re.search(r'\\*"arguments\\*"', text) and "<function=" not in text
        if "<tool_call>" in text and has_json:
            return FORMS["hermes"]
        if "[TOOL_CALLS]" in text and "[ARGS]" not in text:
            return FORMS["mistral"]
        if re.search(r'\\*"name\\*".*\\*"parameters\\*"', text):
            return FORMS["json"]
        return None

    def _render(self, turns: Sequence[tuple[str, str]], **kwargs: Any) -> str | None:
        if not (self._own or getattr(self._tokenizer, "chat_template", None)):
            return None
        messages = [{"role": role, "content": content} for role, content in turns]
        if self._own:
            kwargs["chat_template"] = self._own
        try:
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **kwargs))
        except Exception:  # a template is a program of somebody else's, and says no as it likes
            return None
