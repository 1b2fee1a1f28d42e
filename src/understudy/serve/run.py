"""Keeps the server up: the port, loading in the background, signals, draining, the end.

Knows: uvicorn, threads, signals; where a batching engine comes from (`start_engine`, the only place
here that knows). Does not know: terminals, what is answered.

    listen -> open for connections (503 loading) -> loaded: 200 -> SIGTERM: nothing new (503
    draining), what runs goes on for at most `drain_timeout` -> connections end -> the engine closes

A second signal leaves at once.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from understudy.core import UnderstudyError
from understudy.serve.app import create_app
from understudy.serve.connections import bounded
from understudy.serve.outside import Outside
from understudy.serve.served import Batch, Metrics, Served, Stage
from understudy.serve.settings import Settings
from understudy.serve.tracing import Tracing
from understudy.serve.tracing import tracing as tracing_to

log = logging.getLogger("understudy.serve")

Say = Callable[[str], None]
Start = Callable[[Say], Batch]

LAST_BYTES = 5.0  # seconds for responses to leave after the last token
PATIENCE = 10.0  # seconds for the engine to end


def start_engine(settings: Settings, options: Mapping[str, Any], say: Say) -> Batch:
    """Load the model. ``options``: those of `batch.opening.start`."""
    from understudy.batch.opening import start
    from understudy.batch.tools import require_form

    require_form(settings.tool_call_parser)  # before anything slow
    return start(settings.model, on_status=say, **options)


def close_engine(batch: Batch) -> None:
    batch.close()
    batch.engine.close()


def listen(host: str, port: int) -> socket.socket:
    """The server's socket; the port may be 0, for any that is free."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # Of localhost's two addresses the one that clients write as 127.0.0.1.
        family, _, _, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
        return socket.create_server(address, family=family, backlog=2048)
    except socket.gaierror as error:
        raise UnderstudyError(
            f"cannot listen on {host!r}: {error.strerror}; give --host an address of this machine, "
            "or 0.0.0.0 for all"
        ) from error
    except OSError as error:
        wrong = "--host" if error.errno == errno.EADDRNOTAVAIL else "--port"
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise UnderstudyError(
            f"cannot listen on {host} port {port}: {reason}; choose another with {wrong}"
        ) from error


class Threads(ThreadPoolExecutor):
    """Where requests are read and prepared. asyncio would wait at its end for all of them, also for
    one that is stuck (a grammar without end); whoever asked is gone by then."""

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        super().shutdown(wait=False, cancel_futures=True)


class Server(uvicorn.Server):
    """uvicorn with a beginning before the model and an end after the last answer."""

    def __init__(
        self,
        settings: Settings,
        start: Start,
        say: Say,
        stage: Stage,
        app: FastAPI,
        observe: Callable[[Batch], Metrics | None] = lambda batch: None,
        tracing: Tracing | None = None,
    ) -> None:
        """``observe``: what looks at the engine from outside, as soon as it is there."""
        super().__init__(
            uvicorn.Config(
                app,
                http=bounded(settings),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=settings.access_log,
                server_header=False,
                timeout_keep_alive=round(settings.keep_alive),
                timeout_graceful_shutdown=round(LAST_BYTES),
            )
        )
        self._settings, self._start, self._say = settings, start, say
        self._stage, self._observe, self._tracing = stage, observe, tracing
        self._signals = 0
        self._port = settings.port
        self._loop: asyncio.AbstractEventLoop
        self.failure: BaseException | None = None

    async def _serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.set_default_executor(Threads(thread_name_prefix="understudy-serve"))
        for listener in sockets or ():
            self._port = listener.getsockname()[1]  # not the one asked for, if that was 0
        threading.Thread(target=self._load, name="understudy-load", daemon=True).start()
        await super()._serve(sockets)

    # -------------------------------------------------------------------------- beginning

    def _load(self) -> None:
        """In its own thread: the loop answers that it is loading."""
        try:
            batch = self._start(self._say)
            served = Served.of(batch, self._settings, self._tracing)
            metrics = self._observe(batch)
        except BaseException as error:
            self._on_loop(self._give_up, error)
        else:
            self._on_loop(self._open, served, metrics)

    def _on_loop(self, what: Callable[..., None], *arguments: Any) -> None:
        with suppress(RuntimeError):  # the server has left meanwhile
            self._loop.call_soon_threadsafe(what, *arguments)

    def _open(self, served: Served, metrics: Metrics | None) -> None:
        self._stage.open(served, metrics)
        self._say(ready(self._settings, served, self._port))

    def _give_up(self, error: BaseException) -> None:
        self.failure = error
        self.should_exit = True

    # -------------------------------------------------------------------------------- end

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own would raise the signal once more when all is done."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        wanted = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in wanted}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._signals += 1
        self._loop.call_soon_threadsafe(self._leave, self._signals > 1)

    def _leave(self, at_once: bool) -> None:
        served = self._stage.opened
        self._stage.draining = True
        if at_once or served is None:
            self.force_exit = self.should_exit = True
            for connection in list(self.server_state.connections):
                connection.transport.abort()
        else:
            self._say(f"finishing what runs, for at most {self._settings.drain_timeout:g} s")
            # Not one of asyncio's threads: those are waited for, and this one may be stuck.
            threading.Thread(target=self._drain, args=(served.batch,), daemon=True).start()

    def _drain(self, batch: Batch) -> None:
        if not batch.drain(self._settings.drain_timeout):
            self._say("some answers were cut off")
        self._on_loop(self._end)

    def _end(self) -> None:
        self.should_exit = True


def serve(settings: Settings, start: Start, say: Say, listener: socket.socket) -> bool:
    """Serve until a signal comes. False: it had to leave before everything was in order, and
    threads may still be at work. Raises what loading raised."""
    stage = Stage()
    outside = Outside(settings.names[0], stage.require)
    page = (outside.routers, outside.open_paths) if settings.page else ((), ())
    tracing = tracing_to(settings.traces_endpoint, settings.names[0])
    app = create_app(stage, settings, routers=page[0], open_paths=page[1])
    server = Server(settings, start, say, stage, app, outside.open, tracing)
    asyncio.run(server.serve(sockets=[listener]))
    if tracing is not None:
        tracing.close()
    if server.failure is not None:
        raise server.failure
    return not server.force_exit and (stage.opened is None or _closed(stage.opened.batch))


def _closed(batch: Batch) -> bool:
    """The engine's thread has ended, and nothing is held any more. A step that is stuck (a disk
    that does not answer) is not waited for."""
    closing = threading.Thread(target=close_engine, args=(batch,), daemon=True)
    closing.start()
    closing.join(PATIENCE)
    return not closing.is_alive()


def ready(settings: Settings, served: Served, port: int) -> str:
    """What a user wants to see: where, what, how long."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    names = ", ".join(settings.names)
    return f"ready: http://{host}:{port} (model {names}, context {served.batch.context} tokens)"


def log_to_stderr(access: bool) -> None:
    """What the server has to say while it runs; guests only when something is wrong."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    levels = {
        "understudy": logging.INFO,
        "uvicorn.error": logging.WARNING,
        "uvicorn.access": logging.INFO if access else logging.CRITICAL,
    }
    for name, level in levels.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
