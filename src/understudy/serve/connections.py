"""Connections that cannot be held for ever: uvicorn's HTTP/1.1 protocol with limits in time.

Knows: uvicorn's `H11Protocol` and asyncio's transports. Does not know: what is said over them.

uvicorn waits without end for a client that sends half a request, and for one that reads nothing of
its response. Here the one has `body_timeout` for its headers, the other `write_timeout` until it
takes something; then the connection is aborted, and the request behind it is cancelled as with any
other client that leaves. (A body that comes slowly is `intake`'s affair.)
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from understudy.serve.errors import Problem
from understudy.serve.settings import Settings


class Connection(H11Protocol):
    """One client. Subclassed by `bounded` with the settings of the server."""

    settings: Settings
    _stuck: asyncio.TimerHandle | None = None
    _silent: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._silent = self.loop.call_later(self.settings.body_timeout, self._hang_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self._busy and self._silent is not None:
            self._silent.cancel()
            self._silent = None

    @property
    def _busy(self) -> bool:
        """A request is being answered. uvicorn's keep-alive timer watches idle connections, but
        every byte stops it: also one byte of a request that never becomes whole."""
        return self.cycle is not None and not self.cycle.response_complete

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._silent is None and not self.transport.is_closing():
            patience = self.settings.body_timeout + self.settings.keep_alive
            self._silent = self.loop.call_later(patience, self._hang_up)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader(self.transport.get_write_buffer_size())

    def _watch_reader(self, waiting: int) -> None:
        """A large answer may take a slow network minutes. Only who takes nothing at all of the
        ``waiting`` bytes is stuck."""
        patience = self.settings.write_timeout
        self._stuck = self.loop.call_later(patience, self._require_progress, waiting)

    def _require_progress(self, before: int) -> None:
        waiting = self.transport.get_write_buffer_size()
        if waiting < before:
            self._watch_reader(waiting)
        else:
            self.transport.abort()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is answered in the envelope too."""
        problem = Problem(400, "this is not HTTP that can be understood", code="invalid_http")
        body = problem.envelope().model_dump_json().encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            (b"connection", b"close"),
        ]
        events = (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        )
        for event in events:
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _hang_up(self) -> None:
        self._silent = None
        if not self._busy:
            self.transport.abort()

    def _forget(self) -> None:
        for timer in (self._stuck, self._silent):
            if timer is not None:
                timer.cancel()
        self._stuck = self._silent = None


def bounded(settings: Settings) -> type[Connection]:
    """What uvicorn makes a connection of."""

    class Bounded(Connection):
        pass

    Bounded.settings = settings
    return Bounded
