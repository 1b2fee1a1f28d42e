"""Tool calls: how a model is told of tools, held to their form, and heard when it calls one.

Knows: the forms in which model families write calls (`FORMS`), chat templates, OpenAI's shape of
tools, choices and streamed calls. Does not know: HTTP, how a grammar is compiled, what a tool does.

A model whose chat template shows tools is told of them by its template. Any other is told in words
of ours, in the form that most models were taught (Hermes). transformers has parsers for calls too,
but they hand a call over when it is complete; clients are used to arguments as they are written.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from understudy.batch import Grammar
from understudy.batch.grammar import GrammarError, Grammars, json_rule
from understudy.core import UnknownName


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
Event = Content | ToolCallDelta


# -------------------------------------------------------------------------------------- the forms


@dataclass(frozen=True, slots=True)
class Form:
    """How calls are written: ``open``, then ``before`` (a pattern) and an object with ``name`` and
    ``arguments`` under these keys, then ``after`` (a pattern; its group ``more``: another object
    follows). ``open`` empty: a call is an answer that begins with such an object; ``between`` two.
    """

    name: str
    open: str
    arguments: str
    before: str
    after: str
    example: str
    between: str = ""
    special: bool = False  # ``open`` is a special token in the models that use it

    def written(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Calls of the past, as the model would have written them."""
        bodies = [
            json.dumps({"name": c["name"], self.arguments: c["arguments"]}, ensure_ascii=False)
            for c in calls
        ]
        if self.name == "mistral":
            return f"{self.open} [{', '.join(bodies)}]"
        if self.name == "json":
            return f"{self.between} ".join(bodies)
        return "\n".join(f"<tool_call>\n{body}\n</tool_call>" for body in bodies)


FORMS = {
    form.name: form
    for form in (
        Form(
            "hermes",
            open="<tool_call>",
            arguments="arguments",
            before=r"\s*",
            after=r"</tool_call>",
            example='<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
            "</tool_call>",
        ),
        Form(
            "json",
            open="",
            arguments="parameters",
            before=r"\s*(?:<\|python_tag\|>)?\s*",
            after=r"\}",
            example='{"name": <function-name>, "parameters": <args-json-object>}',
            between=";",
        ),
        Form(
            "mistral",
            open="[TOOL_CALLS]",
            arguments="arguments",
            before=r"\s*\[?\s*",
            after=r"\}\s*(?:(?P<more>,)|\])",
            example='[TOOL_CALLS] [{"name": <function-name>, "arguments": <args-json-object>}]',
            special=True,
        ),
    )
}

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

    def __init__(self, form: Form, native: bool, knows_system: bool) -> None:
        self.form, self.native, self._knows_system = form, native, knows_system
        self.skip_special_tokens = not form.special

    @classmethod
    def of(cls, name: str, tokenizer: Any, chat_template: str | None = None) -> ToolFormat:
        """``name``: hermes, json, mistral, or auto: by the look of the chat template.
        ``chat_template``: in place of the tokenizer's own."""
        if name != "auto" and name not in FORMS:
            raise UnknownName(f"tool calls are known as auto, {', '.join(FORMS)}; not as {name!r}")
        template = _Template(tokenizer, chat_template)
        shows = template.shows_tools()
        found = FORMS.get(name) or (template.form() if shows else None)
        # A form that is not known here could be shown to the model, but not understood.
        return cls(found or FORMS["hermes"], shows and found is not None, template.knows_system())

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
        rules = _Rules(self.form, functions, grammars.marker, parallel)
        if choice != "auto":
            return grammars.lark(rules.whole())
        return grammars.after(
            rules.after_triggers(), at_start=not self.form.open, once=not parallel
        )

    def parser(self, tools: Sequence[Tool]) -> ToolParser:
        return ToolParser(self.form, [tool["function"]["name"] for tool in tools])

    def _in_plain_turns(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Calls and results of the past for a template that has no place for them."""
        plain: list[dict[str, Any]] = []
        for message in messages:
            calls = message.pop("tool_calls", None)
            if calls:
                written = self.form.written([call["function"] for call in calls])
                message["content"] = "\n".join(filter(None, [message["content"], written]))
            if message["role"] != "tool":
                plain.append(message)
                continue
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if plain and plain[-1].get("results"):
                plain[-1]["content"] += "\n" + result
            else:
                plain.append({"role": "user", "content": result, "results": True})
        return [{k: v for k, v in message.items() if k != "results"} for message in plain]

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
    except ValueError:
        return arguments  # the client's own text: the model is shown what it was


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


class _Rules:
    """The form as a grammar in Lark."""

    def __init__(
        self,
        form: Form,
        functions: Sequence[Mapping[str, Any]],
        marker: Callable[[str], str],
        parallel: bool,
    ) -> None:
        self._form, self._functions, self._marker = form, functions, marker
        self._parallel = parallel

    def whole(self) -> str:
        """An answer that is calls and nothing else."""
        form = self._form
        if form.name == "hermes":
            one = f"{self._marker(form.open)} {self._body()}"
            start = f"({one}) (WS? {one})*" if self._parallel else one
        elif form.name == "mistral":
            start = f"{self._marker(form.open)} {self._body()}"
        else:
            start = self._calls()
        return self._grammar(start)

    def after_triggers(self) -> dict[str, str]:
        """What makes a text a call -> how it goes on from there."""
        if self._form.open:
            return {self._form.open: self._grammar(self._body())}
        names = [(json.dumps(f["name"]), f) for f in self._functions]
        return {
            f'{{"name":{space}{name}': self._grammar(f"{self._rest(f)}{self._others()}")
            for name, f in names
            for space in ("", " ")
        }

    def _body(self) -> str:
        if self._form.name == "mistral":
            return f'WS? "[" WS? {self._calls()} WS? "]"'
        return f"WS? call WS? {self._marker('</tool_call>')}"

    def _calls(self) -> str:
        return f"call {self._others()}"

    def _others(self) -> str:
        separator = self._form.between or ","
        return f' (WS? "{separator}" WS? call)*' if self._parallel else ""

    def _grammar(self, start: str) -> str:
        calls = " | ".join(
            f'"{{" WS? "\\"name\\"" WS? ":" WS? {_quoted(json.dumps(f["name"]))} {self._rest(f)}'
            for f in self._functions
        )
        return f"start: {start}\ncall: {calls}\nWS: / |\\n[ \\t]{{0,32}}/\n"

    def _rest(self, function: Mapping[str, Any]) -> str:
        """A call from the end of its name on."""
        key = _quoted(json.dumps(self._form.arguments))
        value = json_rule(_schema(function), strict=bool(function.get("strict")))
        return f'WS? "," WS? {key} WS? ":" WS? {value} WS? "}}"'


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _schema(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a function's arguments. No parameters said: it has none."""
    parameters = function.get("parameters")
    if not parameters:
        return {"type": "object", "additionalProperties": False}
    return {"type": "object", **parameters}


# ------------------------------------------------------------------------------------ the parser


class ToolParser:
    """One answer's text on its way in -> content and calls on their way out.

    White space around calls is not content. What looks like a call and is none after all (another
    form, a tool that was not offered) is content, as it stands.
    """

    def __init__(self, form: Form, names: Sequence[str]) -> None:
        self._form, self._names = form, frozenset(names)
        self.calls = 0  # begun so far
        self._text = ""  # not understood yet
        self._raw = ""  # of the call that is being read, up to its arguments: content if it is none
        self._state = self._in_text if form.open else self._at_start
        key = re.escape(form.arguments)
        self._head = re.compile(
            rf'{form.before}\{{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"{key}"\s*:\s*(?=\{{)'
        )
        self._after = re.compile(form.after)
        self._json = _ValueEnd()

    def feed(self, text: str) -> list[Event]:
        self._text += text
        events: list[Event] = []
        while self._state(events):
            pass
        return events

    def finish(self) -> list[Event]:
        """The answer is over: what was held back."""
        events: list[Event] = []
        if self._state in (self._in_head, self._at_start):
            self._whole(self._text, events)
        elif self._state == self._in_text:
            self._say(self._text, events)
        self._text = ""
        return events

    # Each state reads what it can of the text; True: another state may read on.

    def _in_text(self, events: list[Event]) -> bool:
        marker = self._form.open
        place = self._text.find(marker) if marker else -1
        if place >= 0:
            self._say(self._text[:place].rstrip(), events)
            self._raw, self._text = marker, self._text[place + len(marker) :]
            self._state = self._in_head
            return True
        kept = len(self._text) - _end_of_content(self._text, marker)
        self._say(self._text[: len(self._text) - kept], events)
        self._text = self._text[len(self._text) - kept :]
        return False

    def _at_start(self, events: list[Event]) -> bool:
        """Forms without a marker: is it a call at all?"""
        squeezed = re.sub(r"\s|<\|python_tag\|>", "", self._text)
        heads = ['{"name":' + json.dumps(name) for name in self._names]
        if any(squeezed.startswith(head) for head in heads):
            self._raw, self._state = "", self._in_head
            return True
        may_be = not squeezed or any(head.startswith(squeezed) for head in heads)
        if not may_be and not "<|python_tag|>".startswith(squeezed):
            self._state = self._in_text
            return True
        return False

    def _in_head(self, events: list[Event]) -> bool:
        head = self._head.match(self._text)
        if head is not None and json.loads(head[1]) in self._names:
            self._begin(json.loads(head[1]), events)
            self._text = self._text[head.end() :]
            self._state = self._in_arguments
            return True
        end = self._after.search(self._text) if self._form.name == "hermes" else None
        if end is None:
            return False
        body, self._text = self._text[: end.end()], self._text[end.end() :]
        self._whole(body, events)
        self._state = self._in_text
        return True

    def _in_arguments(self, events: list[Event]) -> bool:
        end = self._json.find(self._text)
        written, self._text = self._text[:end], self._text[end:]
        if written:
            events.append(ToolCallDelta(self.calls - 1, written))
        if not self._json.complete:
            return False
        self._json = _ValueEnd()
        self._state = self._in_tail
        return True

    def _in_tail(self, events: list[Event]) -> bool:
        end = self._after.search(self._text)
        if end is None:
            return False
        self._text = self._text[end.end() :]
        self._raw = ""
        if end.groupdict().get("more"):
            self._state = self._in_head
        else:
            self._state = self._between if self._form.between else self._in_text
        return True

    def _between(self, events: list[Event]) -> bool:
        """After a call without a marker: another one, or text."""
        rest = self._text.lstrip()
        if not rest:
            return False
        if rest.startswith(self._form.between):
            self._raw, self._text = self._form.between, rest[len(self._form.between) :]
            self._state = self._in_head
        else:
            self._state = self._in_text
        return True

    def _begin(self, name: str, events: list[Event]) -> None:
        events.append(ToolCallDelta(self.calls, id=_new_id(self._form), name=name))
        self.calls += 1

    def _say(self, text: str, events: list[Event]) -> None:
        """Content; white space alone is none once there was a call."""
        if text and not (self.calls and text.isspace()):
            events.append(Content(text))

    def _whole(self, body: str, events: list[Event]) -> None:
        """A body that is not as it should be: perhaps its keys are in another order."""
        try:
            call = json.loads(self._after.split(body)[0] if self._form.open else body)
            name, arguments = call["name"], call[self._form.arguments]
        except (ValueError, TypeError, KeyError):
            return self._say(self._raw + body, events)
        arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
        if name not in self._names:
            return self._say(self._raw + body, events)
        self._begin(name, events)
        events.append(ToolCallDelta(self.calls - 1, arguments))
        return None


class _ValueEnd:
    """Where a JSON object ends, in pieces of text."""

    def __init__(self) -> None:
        self.complete = False
        self._depth = 0
        self._in_string = self._escaped = False

    def find(self, text: str) -> int:
        """How much of ``text`` belongs to the object."""
        for i, letter in enumerate(text):
            self._read(letter)
            if self.complete:
                return i + 1
        return len(text)

    def _read(self, letter: str) -> None:
        if self._escaped:
            self._escaped = False
        elif self._in_string:
            self._escaped = letter == "\\"
            self._in_string = letter != '"'
        elif letter == '"':
            self._in_string = True
        elif letter in "{[":
            self._depth += 1
        elif letter in "}]":
            self._depth -= 1
            self.complete = self._depth == 0


def _end_of_content(text: str, marker: str) -> int:
    """Up to where text is content for certain: not the white space before a call, nor the
    beginning of a marker."""
    begun = (n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n]))
    return len(text[: len(text) - next(begun, 0)].rstrip())


def _new_id(form: Form) -> str:
    if form.name == "mistral":  # its templates insist on nine letters or digits
        letters = string.ascii_letters + string.digits
        return "".join(secrets.choice(letters) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"
