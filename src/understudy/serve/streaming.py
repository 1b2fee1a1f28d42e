"""Answers on their way to a client: in one JSON, or piece by piece as server-sent events.

Knows: how a stream begins, stays alive, fails in the middle and ends. Does not know: what a piece
looks like (`forms.Form` does: a chat or a completion).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from understudy.serve.answers import Answers, ClientGone, unless_gone
from understudy.serve.errors import Problem, problem_of
from understudy.serve.forms import Form
from understudy.serve.intake import client_gone
from understudy.serve.served import Served
from understudy.serve.tracing import RequestSpan

PING = b": ping\n\n"  # a comment: clients skip it, proxies see that somebody is still there


async def answer(
    request: Request, served: Served, prepare: Callable[[], Form], stream: bool
) -> Response:
    """The response to a request. ``prepare`` makes the asks of it: in a thread, because tokenising
    and grammars take their time, and other requests should not wait for them."""
    answers = Answers(served)

    def begin() -> Form:
        form = prepare()
        answers.submit(form.asks)
        return form

    handed_over = False
    try:
        form = await unless_gone(request, asyncio.to_thread(begin))
        span = form.trace(served.tracing, request.headers) if served.tracing else None
        if stream:
            handed_over = True
            return EventStream(answers, form, span)
        return await unless_gone(request, _together(answers, form, span))
    except ClientGone:
        return client_gone()
    finally:
        if not handed_over:
            answers.close()


@contextmanager
def _traced(form: Form, span: RequestSpan | None) -> Iterator[None]:
    """What happens in the block is what ``span`` will tell."""
    try:
        yield
    except BaseException as error:
        if span is not None:
            span.fail(error)
        raise
    if span is not None:
        form.end_trace(span)


async def _together(answers: Answers, form: Form, span: RequestSpan | None) -> Response:
    with _traced(form, span):
        async for arrived in answers.deltas(len(form.asks)):
            if arrived is not None:
                form.add(*arrived)
    body = await asyncio.to_thread(lambda: form.whole().model_dump_json())
    return Response(body, media_type="application/json")


class EventStream(StreamingResponse):
    """Server-sent events. Owns ``answers``: when the stream ends, however it does, they end."""

    media_type = "text/event-stream"

    def __init__(self, answers: Answers, form: Form, span: RequestSpan | None) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_events(answers, form, span), headers=headers)
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.close()


async def _events(answers: Answers, form: Form, span: RequestSpan | None) -> AsyncIterator[bytes]:
    try:
        with _traced(form, span):
            async for arrived in answers.deltas(len(form.asks)):
                for piece in form.pieces(*arrived) if arrived else ():
                    yield _event(piece.model_dump_json())
                if arrived is None:
                    yield PING
        for piece in form.closing():
            yield _event(piece.model_dump_json())
    except Exception as error:  # the status is sent already; the stream itself must say it
        yield _event(_envelope(problem_of(error)))
    yield _event("[DONE]")


def _event(data: str) -> bytes:
    return b"data: " + data.encode() + b"\n\n"


def _envelope(problem: Problem) -> str:
    return problem.envelope().model_dump_json()
