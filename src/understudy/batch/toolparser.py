"""The text of one answer -> what is said and what is called, while it streams.

Knows: forms of calls, JSON's brackets and strings. Does not know: grammars, templates, HTTP.

transformers has parsers for calls too, but they hand a call over when it is complete; clients are
used to arguments that come as they are written.
"""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Sequence
from dataclasses import dataclass

from understudy.batch.toolforms import PYTHON_TAG, Form


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


Event = Content | ToolCallDelta


class ToolParser:
    """White space around calls is not content. What looks like a call and is none after all
    (another form, a tool that was not offered) is content, as it stands.

    ``names``: the tools that were offered. ``calls``: begun so far.
    """

    def __init__(self, form: Form, names: Sequence[str]) -> None:
        self._form, self._names = form, frozenset(names)
        self.calls = 0
        self._text = ""  # not understood yet
        self._raw = ""  # what led to the call that is being read: content, if it is none
        self._state = self._in_text if form.open else self._at_start
        self._object = ObjectEnd()
        self._head, self._tail = _patterns(form)

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
            self._read_at_once(self._text, events)
        elif self._state == self._in_text:
            self._say(self._text, events)
        self._text = ""
        return events

    # A state reads what it can. True: there may be more to read, in this state or the next.

    def _in_text(self, events: list[Event]) -> bool:
        marker = self._form.open
        place = self._text.find(marker) if marker else -1
        if place >= 0:
            self._say(self._take(place).rstrip(), events)
            self._raw = self._take(len(marker))
            self._state = self._in_head
            return True
        self._say(self._take(_certain(self._text, marker)), events)
        return False

    def _at_start(self, events: list[Event]) -> bool:
        """Of a form without a marker: is it a call at all?"""
        begun = re.sub(r"\s", "", self._text).removeprefix(PYTHON_TAG)
        heads = [f'{{"name":{json.dumps(name, ensure_ascii=False)}' for name in self._names]
        if any(begun.startswith(head) for head in heads):
            self._state = self._in_head
            return True
        if any(head.startswith(begun) for head in (*heads, PYTHON_TAG)):
            return False
        self._state = self._in_text
        return True

    def _in_head(self, events: list[Event]) -> bool:
        """Up to the arguments, which go out as they come."""
        head = self._head.match(self._text)
        if head is not None and head["name"] in self._names:
            self._begin(head["name"], events)
            self._take(head.end())
            self._state = self._in_arguments
            return True
        last = self._form.last
        end = -1 if self._form.separator else self._text.find(last)
        if end < 0:
            return False
        self._read_at_once(self._take(end + len(last)), events)
        self._state = self._in_text
        return True

    def _in_arguments(self, events: list[Event]) -> bool:
        written = self._take(self._object.find(self._text))
        if written:
            events.append(ToolCallDelta(self.calls - 1, written))
        if not self._object.found:
            return False
        self._object = ObjectEnd()
        self._state = self._in_tail
        return True

    def _in_tail(self, events: list[Event]) -> bool:
        tail = self._tail.search(self._text)
        if tail is None:
            return False
        self._raw = ""
        self._take(tail.end())
        if tail.groupdict().get("more"):
            self._state = self._in_head
        else:
            self._state = self._in_text if self._form.last else self._between
        return True

    def _between(self, events: list[Event]) -> bool:
        """After a call of a form without a marker: another one, or text."""
        rest = self._text.lstrip()
        if not rest:
            return False
        if rest.startswith(self._form.separator):
            self._take(len(self._text) - len(rest))
            self._raw = self._take(len(self._form.separator))
            self._state = self._in_head
        else:
            self._state = self._in_text
        return True

    def _take(self, count: int) -> str:
        taken, self._text = self._text[:count], self._text[count:]
        return taken

    def _say(self, text: str, events: list[Event]) -> None:
        """Content; white space alone is none once there was a call."""
        if text and not (self.calls and text.isspace()):
            events.append(Content(text))

    def _begin(self, name: str, events: list[Event]) -> None:
        events.append(ToolCallDelta(self.calls, id=_new_id(self._form), name=name))
        self.calls += 1

    def _read_at_once(self, body: str, events: list[Event]) -> None:
        """A call that is not as it should be: perhaps its keys are in another order."""
        try:
            form = self._form
            call = json.loads(body.strip().removeprefix(form.first).removesuffix(form.last))
            name, arguments = call["name"], call[form.arguments]
            known = name in self._names
        except (ValueError, TypeError, KeyError, RecursionError):
            known = False
        if not known:
            return self._say(self._raw + body, events)
        self._begin(name, events)
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        events.append(ToolCallDelta(self.calls - 1, text))
        return None


class ObjectEnd:
    """Where a JSON object ends, in text that comes in pieces."""

    def __init__(self) -> None:
        self.found = False
        self._depth = 0
        self._in_string = self._escaped = False

    def find(self, text: str) -> int:
        """How much of ``text`` belongs to the object."""
        for i, letter in enumerate(text):
            self._read(letter)
            if self.found:
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
            self.found = self._depth == 0


def _patterns(form: Form) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """A call up to its arguments, and what follows these."""
    first = re.escape(form.first if form.open else PYTHON_TAG)
    name = r'"name"\s*:\s*"(?P<name>[^"\\]*)"'
    head = rf'\s*(?:{first})?\s*\{{\s*{name}\s*,\s*"{form.arguments}"\s*:\s*(?=\{{)'
    tail = r"\}"
    if form.last:
        more = f"(?P<more>{re.escape(form.separator)})|" if form.separator else ""
        tail += rf"\s*(?:{more}{re.escape(form.last)})"
    return re.compile(head), re.compile(tail)


def _certain(text: str, marker: str) -> int:
    """How much of a text is content for certain: not the white space before a call that may come,
    nor the beginning of its marker."""
    lengths = range(min(len(marker) - 1, len(text)), 0, -1)
    begun = next((n for n in lengths if text.endswith(marker[:n])), 0)
    return len(text[: len(text) - begun].rstrip())


def _new_id(form: Form) -> str:
    if form.name == "mistral":  # its templates insist on nine letters or digits
        letters = string.ascii_letters + string.digits
        return "".join(secrets.choice(letters) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"
