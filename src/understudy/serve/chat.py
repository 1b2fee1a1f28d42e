"""``POST /v1/chat/completions``: a conversation goes on.

Knows: OpenAI's chat. Does not know: how a stream is sent, how a tool call is written by a model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from understudy.batch import Delta
from understudy.batch.tools import Content, ToolCallDelta
from understudy.serve import shapes
from understudy.serve.asks import ask_of, conversation_tokens, grammar_of, several, uses_tools
from understudy.serve.collected import Collected, chat_logprobs
from understudy.serve.forms import Form
from understudy.serve.protocol import ChatRequest
from understudy.serve.served import Served


class ChatForm(Form):
    """The answers to one `ChatRequest`."""

    prefix = "chatcmpl"
    operation = "chat"

    def __init__(self, served: Served, body: ChatRequest, experts: bool) -> None:
        tools = uses_tools(body)
        limit = body.max_completion_tokens or body.max_tokens
        ask = ask_of(
            served,
            body,
            conversation_tokens(served, body, with_tools=tools),
            new_tokens=limit,
            param="messages",
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
            grammar=grammar_of(served, body),
            skip_special_tokens=skips_special_tokens(served, body),
        )
        super().__init__(served, body, list(several(ask, body.n or 1)), experts)
        offered = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        self._heard = [Heard(served, offered if tools else None) for _ in self.asks]
        self._logprobs = bool(body.logprobs)

    def choices(self, number: int, delta: Delta, begun: bool) -> Iterator[BaseModel]:
        content, calls = self._heard[number].hear(delta)
        said: dict[str, Any] = {} if begun else {"role": "assistant"}
        if content or not (begun or calls):
            said["content"] = content
        if calls:
            said["tool_calls"] = calls
        logprobs = self._logprobs_of(delta)
        if said or logprobs is not None:
            yield shapes.ChatChunkChoice(
                index=number, delta=shapes.ChatDelta(**said), logprobs=logprobs
            )
        if delta.last:
            answer = self.answers[number]
            yield shapes.ChatChunkChoice(
                index=number,
                delta=shapes.ChatDelta(),
                finish_reason=self._finish(number),
                stop_reason=answer.stop_reason,
            )

    def _logprobs_of(self, delta: Delta) -> shapes.ChatLogprobs | None:
        if not (self._logprobs and delta.logprobs):
            return None
        return shapes.ChatLogprobs(content=chat_logprobs(self._spelling, delta.logprobs))

    def chunk(self, choices: Sequence[Any], **more: Any) -> BaseModel:
        return shapes.ChatChunk(choices=list(choices), **self._head, **more)

    def whole(self) -> BaseModel:
        choices = [self._choice(number, answer) for number, answer in enumerate(self.answers)]
        return shapes.ChatCompletion(choices=choices, **self._head, **self.tail())

    def _choice(self, number: int, answer: Collected) -> shapes.ChatChoice:
        content, pieces = self._heard[number].hear(
            Delta(text=answer.text, finish="stop")  # all of it at once
        )
        calls = [
            shapes.CalledTool(id=piece.id, type="function", function=piece.function)
            for piece in pieces
        ]
        logprobs = None
        if self._logprobs:
            logprobs = shapes.ChatLogprobs(content=chat_logprobs(self._spelling, answer.logprobs))
        return shapes.ChatChoice(
            index=number,
            message=shapes.AssistantMessage(
                content=content or (None if calls else ""), tool_calls=calls or None
            ),
            logprobs=logprobs,
            finish_reason=self._finish(number),
            stop_reason=answer.stop_reason,
        )

    def _finish(self, number: int) -> shapes.Finish:
        if self.answers[number].finish == "length":
            return "length"
        return "tool_calls" if self._heard[number].calls else "stop"


def skips_special_tokens(served: Served, body: ChatRequest) -> bool:
    """The markers of tool calls may be special tokens, which the parser must see."""
    if uses_tools(body):
        return served.tools.skip_special_tokens
    return body.skip_special_tokens is not False


class Heard:
    """One answer's text, apart in what is said and what is called."""

    def __init__(self, served: Served, tools: list[dict[str, Any]] | None) -> None:
        self._parser = None if tools is None else served.tools.parser(tools)

    @property
    def calls(self) -> int:
        return 0 if self._parser is None else self._parser.calls

    def hear(self, delta: Delta) -> tuple[str, list[shapes.CalledToolPiece]]:
        if self._parser is None:
            return delta.text, []
        events = self._parser.feed(delta.text)
        if delta.last:
            events = [*events, *self._parser.finish()]
        content = "".join(event.text for event in events if isinstance(event, Content))
        return content, joined(event for event in events if isinstance(event, ToolCallDelta))


def joined(events: Iterable[ToolCallDelta]) -> list[shapes.CalledToolPiece]:
    """What a step has added to each call: one piece for each, as OpenAI sends them."""
    pieces: dict[int, shapes.CalledToolPiece] = {}
    for event in events:
        known = pieces.get(event.index)
        if known is None:
            pieces[event.index] = _piece(event)
        else:
            known.function.arguments += event.arguments
    return list(pieces.values())


def _piece(event: ToolCallDelta) -> shapes.CalledToolPiece:
    return shapes.CalledToolPiece(
        index=event.index,
        id=event.id,
        type="function" if event.id else None,
        function=shapes.CalledFunction(name=event.name, arguments=event.arguments),
    )
