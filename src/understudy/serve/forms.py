"""How the answers to one request are written: what chats and completions have in common.

Knows: ids, usage, which piece of a stream is the last one. Does not know: JSON, sockets.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from understudy.batch import Ask, Delta, Report
from understudy.serve.collected import Collected
from understudy.serve.protocol import Generation
from understudy.serve.served import Served
from understudy.serve.shapes import experts_of, new_id, usage_of
from understudy.serve.tracing import Operation, RequestSpan, Tracing


class Form:
    """The answers to one request, told of every delta in order. ``asks``: what to submit; answer
    number i is the one to ``asks[i]``. ``experts``: the client wants to know what they did."""

    prefix: str  # of ids
    operation: Operation  # as traces call it

    def __init__(
        self, served: Served, body: Generation, asks: Sequence[Ask], experts: bool
    ) -> None:
        self.asks = asks
        self.answers = [Collected() for _ in asks]
        self._spelling = served.spelling
        self._n = body.n or 1
        self._experts = experts
        options = body.stream_options
        self._usage_wanted = options is not None and bool(options.include_usage)
        self._head: dict[str, Any] = {
            "id": new_id(self.prefix),
            "created": int(time.time()),
            "model": served.name(body.model),
        }

    def add(self, number: int, delta: Delta) -> None:
        """``delta`` is only kept, for `whole`."""
        self.answers[number].add(delta)

    def pieces(self, number: int, delta: Delta) -> Iterator[BaseModel]:
        """What a stream says of ``delta``, which answer ``number`` brought."""
        begun = self.answers[number].begun
        self.add(number, delta)
        choices = list(self.choices(number, delta, begun))
        for choice in choices:
            last = self._complete and choice is choices[-1] and not self._usage_wanted
            yield self.chunk([choice], **(self._told() if last else {}))

    def closing(self) -> Iterator[BaseModel]:
        """What a stream says when all answers have ended."""
        if self._usage_wanted:
            yield self.chunk([], usage=usage_of(self._reports, self._n), **self._told())

    def choices(self, number: int, delta: Delta, begun: bool) -> Iterable[BaseModel]:
        """The pieces themselves. ``begun``: not the answer's first."""
        raise NotImplementedError

    def chunk(self, choices: Sequence[Any], **more: Any) -> BaseModel:
        """What is sent of a stream at once."""
        raise NotImplementedError

    def whole(self) -> BaseModel:
        """Everything in one."""
        raise NotImplementedError

    def tail(self) -> dict[str, Any]:
        """What `whole` has after its choices."""
        return {"usage": usage_of(self._reports, self._n), **self._told()}

    def trace(self, tracing: Tracing, headers: Mapping[str, str]) -> RequestSpan:
        """The request has been understood."""
        ask = self.asks[0]
        return tracing.begin(
            self.operation,
            headers,
            ask.sampling,
            max_tokens=ask.max_new_tokens,
            choices=self._n,
        )

    def end_trace(self, span: RequestSpan) -> None:
        span.end(self._reports, [answer.finish or "error" for answer in self.answers])

    @property
    def _reports(self) -> list[Report]:
        return [answer.report for answer in self.answers if answer.report is not None]

    @property
    def _complete(self) -> bool:
        return all(answer.finish for answer in self.answers)

    def _told(self) -> dict[str, Any]:
        return {"understudy": experts_of(self._reports)} if self._experts else {}
