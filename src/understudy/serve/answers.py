"""The answers to one request, from the engine's thread to the loop, until the client is gone.

Knows: asks and deltas, asyncio, deadlines. Does not know: JSON, what an answer is for.

Whatever happens here (a refusal of one ask of several, a client that leaves or reads too slowly, a
deadline, an engine that dies), what still runs for this request is cancelled at once.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from fastapi import Request

from understudy.batch import Ask, Delta, EngineDied
from understudy.serve.errors import Problem, invalid, problem_of, unavailable
from understudy.serve.served import Served

T = TypeVar("T")


class Answers:
    """Asks on their way. Close it, whatever happens."""

    def __init__(self, served: Served) -> None:
        self._batch, self._settings = served.batch, served.settings
        self._loop = asyncio.get_running_loop()
        self._arrived: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self._lock = threading.Lock()
        self._tickets: dict[int, Any] = {}
        self._closed = self._overrun = False
        self._backlog = 0  # deltas that may wait to be read
        limit = self._settings.request_timeout
        self._deadline = None if limit is None else self._loop.time() + limit

    def close(self) -> None:
        """Cancel what is not finished; repeatable."""
        with self._lock:
            self._closed = True
            tickets, self._tickets = self._tickets, {}
        for ticket in tickets.values():
            self._batch.cancel(ticket)

    def submit(self, asks: Sequence[Ask]) -> None:
        """All or nothing: raises the first refusal. May run in a thread, and may be left there by
        a client that goes away meanwhile."""
        if len(asks) > self._batch.most:  # else it would be told to try later, for ever
            raise invalid(
                f"{len(asks)} answers are wanted; this server takes at most {self._batch.most} "
                "at once, waiting ones included"
            )
        self._backlog = self._settings.backlog * len(asks)
        for number, ask in enumerate(asks):
            ticket = self._batch.submit(ask, partial(self._from_engine, number))
            with self._lock:
                if not self._closed:
                    self._tickets[number] = ticket
                    continue
            self._batch.cancel(ticket)
            return

    def _from_engine(self, number: int, delta: Delta) -> None:
        with suppress(RuntimeError):  # the loop has ended: nobody is there to read it
            self._loop.call_soon_threadsafe(self._arrive, number, delta)

    def _arrive(self, number: int, delta: Delta) -> None:
        """On the loop, also while a stream is stuck in sending: the queue stays bounded."""
        if self._arrived.qsize() < self._backlog:
            self._arrived.put_nowait((number, delta))
        else:
            self._overrun = True
            self.close()

    async def deltas(self, count: int) -> AsyncIterator[tuple[int, Delta] | None]:
        """(number of the answer, delta) until all ``count`` have ended; ``None``: nothing came for
        a heartbeat, and the engine is alive. Raises the `Problem` of an answer that failed."""
        while count:
            self._require_reader()
            self._require_time()
            arrived = await self._next()
            if arrived is not None:
                number, delta = arrived
                require_success(delta)
                if delta.last:
                    count -= 1
                    with self._lock:
                        self._tickets.pop(number, None)
            yield arrived

    async def _next(self) -> tuple[int, Delta] | None:
        await asyncio.sleep(0)  # one who catches up is not served before everybody else
        with suppress(asyncio.QueueEmpty):
            return self._arrived.get_nowait()
        patience = self._settings.heartbeat
        if self._deadline is not None:
            patience = min(patience, self._deadline - self._loop.time())
        try:
            async with asyncio.timeout(patience):
                return await self._arrived.get()
        except TimeoutError:
            if not self._batch.snapshot().alive and self._arrived.empty():
                raise problem_of(EngineDied()) from None
            return None

    def _require_time(self) -> None:
        if self._deadline is not None and self._loop.time() >= self._deadline:
            raise Problem(
                504,
                f"the answer was not complete after {self._settings.request_timeout:g} seconds",
                type="timeout_error",
                code="request_timeout",
                headers={"X-Should-Retry": "false"},
            )

    def _require_reader(self) -> None:
        if self._overrun:
            raise Problem(408, "the client reads too slowly", code="reader_too_slow")


def require_success(delta: Delta) -> None:
    """Not a failure, and not cut off by somebody else than the client."""
    if delta.error is not None:
        raise problem_of(delta.error)
    if delta.finish == "abort":
        raise unavailable("the answer was cut off; the server is shutting down", "aborted")


class ClientGone(Exception):
    """Nobody waits for this response any more."""


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which ends when the client leaves."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await working  # its `finally` gives tickets back before anybody hears of this


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
