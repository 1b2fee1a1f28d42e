"""A server without a model: in this process for httpx, or behind a real port for whole clients."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from serve.fake_batch import FakeBatch

from understudy.serve import run
from understudy.serve.app import create_app
from understudy.serve.served import Served, Stage
from understudy.serve.settings import Settings

COARSE = Path(__file__).parents[2] / "models" / "coarse"


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from understudy.engine import tokenizer_in

    return tokenizer_in(COARSE)


@pytest.fixture
def batch(tokenizer: Any) -> Iterator[FakeBatch]:
    made = FakeBatch(tokenizer)
    yield made
    made.close()


def settings(**changed: Any) -> Settings:
    given = {"model": "/home/somebody/coarse", "names": ("coarse", "alias"), "heartbeat": 0.05}
    return Settings(**{**given, **changed})


Ask = Callable[..., httpx.Response]


class Client:
    """Requests to an application in this process. ``post(path, json)``, ``get(path)``."""

    def __init__(self, batch: FakeBatch | None, **changed: Any) -> None:
        self.settings = settings(**changed)
        self.stage = Stage()
        if batch is not None:
            self.stage.open(Served.of(batch, self.settings))
        self.app = create_app(self.stage, self.settings)

    def send(self, method: str, path: str, **given: Any) -> httpx.Response:
        async def once() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **given)

        return asyncio.run(once())

    def get(self, path: str, **given: Any) -> httpx.Response:
        return self.send("GET", path, **given)

    def post(self, path: str, body: Any, **given: Any) -> httpx.Response:
        return self.send("POST", path, json=body, **given)

    def chat(self, content: Any = "Hello", **more: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": content}], **more}
        return self.post("/v1/chat/completions", body)


@pytest.fixture
def client(batch: FakeBatch) -> Client:
    return Client(batch)


class Running:
    """A server behind a port, in a thread of this process."""

    def __init__(self, start: run.Start, **changed: Any) -> None:
        self.said: list[str] = []
        self.settings = settings(**{"drain_timeout": 1.0, **changed})
        self.listener = run.listen("127.0.0.1", 0)
        # A small buffer: a client that does not read is noticed soon.
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.stage = Stage()
        app = create_app(self.stage, self.settings)
        self.server = run.Server(self.settings, start, self.said.append, self.stage, app)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        asyncio.run(self.server.serve(sockets=[self.listener]))

    def wait_until_ready(self) -> None:
        until(lambda: self.stage.opened is not None)

    def signal(self) -> None:
        """As SIGTERM would."""
        self.server.handle_exit(15, None)

    def stop(self) -> None:
        self.signal()
        self.signal()
        self.thread.join(10)
        assert not self.thread.is_alive()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=5)


@contextmanager
def running(batch: FakeBatch, **changed: Any) -> Iterator[Running]:
    server = Running(lambda say: batch, **changed)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture
def server(batch: FakeBatch) -> Iterator[Running]:
    with running(batch) as made:
        yield made


def until(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    """Wait for something that another thread will do."""
    waiting = threading.Event()
    for _ in range(int(seconds / 0.01)):
        if holds():
            return
        waiting.wait(0.01)
    raise AssertionError("it has not happened")


async def lines(response: httpx.Response) -> AsyncIterator[str]:
    async for line in response.aiter_lines():
        if line:
            yield line
