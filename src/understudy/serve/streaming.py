"""Answers on their way to a client: in one JSON, or piece by piece as server-sent events.

Knows: how a stream begins, stays alive, fails in the middle and ends. Does not know: what a piece
looks like (`forms.Form` does: a chat or a completion).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from understudy.serve.answers import Answers, ClientGone, unless_gone
from understudy.serve.errors import Problem, problem_of
from understudy.serve.forms import Form
from understudy.serve.intake import client_gone
from understudy.serve.served import Served
from understudy.serve.tracing import Operation, Tracer

PING = b": ping\n\n"  # a comment: clients skip it, proxies see that somebody is still there


async def answer(
    request: Request,
    served: Served,
    prepare: Callable[[], Form],
    operation: Operation,
    *,
    stream: bool,
) -> Response:
    """The response to a request. ``prepare`` makes the asks of it: in a thread, because tokenising
    and grammars take their time, and other requests should not wait for them."""
    tracer: Tracer = request.app.state.tracer
    answers = Answers(served, tracer.begin(operation, request.headers))

    def begin() -> Form:
        form = prepare()
        answers.submit(form.asks, form.n)
        return form

    handed_over = False
    try:
        form = await unless_gone(request, asyncio.to_thread(begin))
        if stream:
            handed_over = True
            return EventStream(answers, form)
        return await unless_gone(request, _together(answers, form))
    except ClientGone:
        return client_gone()
    except Exception as error:
        answers.trace.failed(_kind(error))
        raise
    finally:
        if not handed_over:
            answers.close()


async def _together(answers: Answers, form: Form) -> Response:
    async for arrived in answers.deltas(len(form.asks)):
        if arrived is not None:
            form.add(*arrived)
    body = await asyncio.to_thread(lambda: form.whole().model_dump_json())
    return Response(body, media_type="application/json")


class EventStream(StreamingResponse):
    """Server-sent events. Owns ``answers``: when the stream ends, however it does, they end."""

    media_type = "text/event-stream"

    def __init__(self, answers: Answers, form: Form) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(_events(answers, form), headers=headers)
        self._answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.close()


async def _events(answers: Answers, form: Form) -> AsyncIterator[bytes]:
    try:
        async for arrived in answers.deltas(len(form.asks)):
            if arrived is None:
                yield PING
                continue
            for piece in form.pieces(*arrived):
                yield _event(piece.model_dump_json())
        for piece in form.closing():
            yield _event(piece.model_dump_json())
    except Exception as error:  # the status is sent already; the stream itself must say it
        answers.trace.failed(_kind(error))
        yield _event(_envelope(problem_of(error)))
    yield _event("[DONE]")


def _kind(error: Exception) -> str:
    """What a trace is told of it: never its text, which may quote the request."""
    code = error.body.code if isinstance(error, Problem) else None
    return code or type(error).__name__


def _event(data: str) -> bytes:
    return b"data: " + data.encode() + b"\n\n"


def _envelope(problem: Problem) -> str:
    return problem.envelope().model_dump_json()
