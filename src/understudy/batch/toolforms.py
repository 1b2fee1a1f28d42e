"""The forms in which model families write tool calls.

Knows: each form as data (`FORMS`), how calls of the past are written in it, and its rules in Lark.
Does not know: chat templates, how an answer is parsed (`toolparser`), how a grammar is compiled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from understudy.batch.grammar import json_rule

PYTHON_TAG = "<|python_tag|>"  # Llama 3 may put it before a call


@dataclass(frozen=True, slots=True)
class Form:
    """``open first {"name": .., arguments: ..} separator {..} .. last``, where each may be empty.

    ``open`` empty: an answer that begins like a call is one. ``separator`` empty: every call has
    an ``open`` and a ``last`` of its own.
    """

    name: str
    open: str
    first: str
    arguments: str  # the key
    separator: str
    last: str
    example: str

    def written(self, calls: Sequence[Mapping[str, Any]]) -> str:
        """Calls as the model would have written them. ``arguments``: an object."""
        bodies = [
            json.dumps({"name": c["name"], self.arguments: c["arguments"]}, ensure_ascii=False)
            for c in calls
        ]
        if self.separator:
            return f"{self.open}{self.first}{f'{self.separator} '.join(bodies)}{self.last}"
        return "\n".join(f"{self.open}\n{body}\n{self.last}" for body in bodies)


FORMS = {
    form.name: form
    for form in (
        Form(
            "hermes",
            open="<tool_call>",
            first="",
            arguments="arguments",
            separator="",
            last="</tool_call>",
            example='<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
            "</tool_call>",
        ),
        Form(
            "json",
            open="",
            first="",
            arguments="parameters",
            separator=";",
            last="",
            example='{"name": <function-name>, "parameters": <args-json-object>}',
        ),
        Form(
            "mistral",
            open="[TOOL_CALLS]",
            first="[",
            arguments="arguments",
            separator=",",
            last="]",
            example='[TOOL_CALLS][{"name": <function-name>, "arguments": <args-json-object>}]',
        ),
    )
}


class Rules:
    """A form as grammars in Lark. ``functions``: OpenAI's, those that may be called. ``marker``:
    `Grammars.marker`. ``parallel``: more than one call may be made."""

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
        one = f"{self._fixed(self._form.open)} {self._body()}"
        again = self._parallel and not self._form.separator
        return self._grammar(f"{one} (GAP? {one})*" if again else one)

    def after_triggers(self) -> dict[str, str]:
        """What makes a text a call -> how it goes on from there."""
        if self._form.open:
            return {self._form.open: self._grammar(self._body())}
        return {
            f'{tag}{{"name":{space}{_quoted(function["name"])}': self._grammar(
                f"{self._end_of_call(function)} {self._more()}"
            )
            for function in self._functions
            for tag in ("", PYTHON_TAG)
            for space in ("", " ")
        }

    def _body(self) -> str:
        first, last = self._fixed(self._form.first), self._fixed(self._form.last)
        before = "GAP?" if self._form.open else ""
        return f"{before} {first} call {self._more()} {f'GAP? {last}' if last else ''}"

    def _more(self) -> str:
        separator = self._form.separator
        return f"({_quoted(separator)} GAP? call)*" if separator and self._parallel else ""

    def _grammar(self, start: str) -> str:
        key = _quoted(_quoted("name"))
        calls = " | ".join(
            f'"{{" SPACE? {key} SPACE? ":" SPACE? {_quoted(_quoted(f["name"]))} '
            f"{self._end_of_call(f)}"
            for f in self._functions
        )
        return f"start: {start}\ncall: {calls}\nGAP: /[ \\n]/\nSPACE: / /\n"

    def _end_of_call(self, function: Mapping[str, Any]) -> str:
        """From the end of its name on."""
        key = _quoted(_quoted(self._form.arguments))
        value = json_rule(_schema(function), strict=bool(function.get("strict")))
        return f'SPACE? "," SPACE? {key} SPACE? ":" SPACE? {value} SPACE? "}}"'

    def _fixed(self, text: str) -> str:
        return self._marker(text) if text else ""


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _schema(function: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a function's arguments. No parameters said: it has none."""
    parameters = function.get("parameters")
    if not parameters:
        return {"type": "object", "additionalProperties": False}
    return {"type": "object", **parameters}
