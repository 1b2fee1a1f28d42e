"""What goes wrong behind HTTP: a client is told so, in the status or in the stream, and never takes
half an answer for a whole one."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
from faults.test_running import Disk, cut
from serve.conftest import Running, until

from bench.served import Served, free_port
from understudy.batch.opening import start

LONG = {"prompt": "Once upon a time", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
SHORT = {**LONG, "max_tokens": 12}
HELD = {"memory": "1GiB", "slots": 12, "direct_io": False, "self_switch": False}


@dataclass
class Stream:
    """The events of an answer, one by one."""

    events: Iterator[str]
    text: str = ""
    finish: str | None = None
    error: dict[str, Any] | None = None
    done: bool = False

    def read(self, count: int | None = None) -> Stream:
        """So many events more, or all."""
        for _ in range(count or 1_000_000):
            data = next(self.events, None)
            if data is None:
                break
            if data == "[DONE]":
                self.done = True
                continue
            chunk = json.loads(data)
            self.error = chunk.get("error", self.error)
            for choice in chunk.get("choices", ()):
                self.text += choice["text"]
                self.finish = choice["finish_reason"] or self.finish
        return self


class Client:
    """Asks one server, over real sockets."""

    def __init__(self, url: str) -> None:
        self.http = httpx2.Client(base_url=url, timeout=60.0, trust_env=False)

    def whole(self, body: dict[str, Any] = SHORT) -> httpx2.Response:
        return self.http.post("/v1/completions", json=body)

    def text(self, body: dict[str, Any] = SHORT) -> str:
        response = self.whole(body)
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        assert choice["finish_reason"] == "length"
        return str(choice["text"])

    def stream(self, body: dict[str, Any] = LONG) -> httpx2.Response:
        request = self.http.build_request("POST", "/v1/completions", json={**body, "stream": True})
        return self.http.send(request, stream=True)

    def health(self) -> int:
        return self.http.get("/health").status_code


def events(response: httpx2.Response) -> Stream:
    assert response.status_code == 200
    return Stream(event.data for event in httpx2.EventSource(response))


@pytest.fixture
def folder(speaking_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(speaking_model, tmp_path / "secret-place"))


Open = Callable[..., tuple[Running, Client]]


@pytest.fixture
def serving(folder: Path) -> Iterator[Open]:
    """``serving(**settings)``: a server of this process with a real engine, and a client."""
    opened: list[Running] = []

    def make(**settings: Any) -> tuple[Running, Client]:
        server = Running(lambda say: start(folder, on_status=say, **HELD), **settings)
        opened.append(server)
        server.wait_until_ready()
        return server, Client(server.url)

    yield make
    for server in opened:
        server.stop()
        batch = engine_of(server)
        batch.close()
        batch.engine.close()


def engine_of(server: Running) -> Any:
    assert server.stage.opened is not None
    return server.stage.opened.batch


def broke_off(stream: Stream, whole: str) -> None:
    """It says that it failed, it does not claim to be finished, and nothing in it was wrong."""
    assert stream.error is not None
    assert stream.error["message"]
    assert stream.finish is None
    assert whole.startswith(stream.text)
    assert "secret-place" not in str(stream.error)
    assert "Traceback" not in str(stream.error)


def test_a_disk_that_fails_for_a_while(serving: Open) -> None:
    server, client = serving()
    short, long = client.text(SHORT), client.text(LONG)
    disk = Disk(engine_of(server).engine.model)
    with client.stream() as response:
        stream = events(response).read(3)
        disk.fails = lambda: True
        broke_off(stream.read(), long)
    failed = client.whole()
    assert failed.status_code == 500
    assert failed.json()["error"]["type"] == "server_error"
    assert "secret-place" not in failed.text
    assert client.health() == 200  # disks may come back
    disk.fails = lambda: False
    assert client.text(SHORT) == short


def test_a_shard_that_is_cut(serving: Open, folder: Path) -> None:
    _, client = serving()
    long = client.text(LONG)
    with client.stream() as response:
        stream = events(response).read(3)
        (weights,) = folder.glob("*.safetensors")
        cut(weights)
        broke_off(stream.read(), long)
    failed = client.whole()
    assert failed.status_code == 500
    assert "secret-place" not in failed.text


def test_a_dead_engine_is_told_by_health_and_to_everybody(
    serving: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, client = serving()
    long = client.text(LONG)

    def broken() -> Sequence[Any]:
        raise RuntimeError("a bug in secret-place")

    with client.stream() as response:
        stream = events(response).read(3)
        monkeypatch.setattr(engine_of(server)._scheduler, "next", broken)
        broke_off(stream.read(), long)
    assert client.health() == 503
    refused = client.whole()
    assert refused.status_code == 503
    assert "restart" in refused.json()["error"]["message"]
    assert "secret-place" not in refused.text


@pytest.mark.parametrize("jump", [-3e8, 3e8])
def test_a_jump_of_the_clock_changes_nothing(
    serving: Open, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    _, client = serving(request_timeout=50.0, body_timeout=50.0, write_timeout=50.0)
    long, real = client.text(LONG), time.time
    with client.stream() as response:
        stream = events(response).read(3)
        monkeypatch.setattr(time, "time", lambda: real() + jump)
        stream.read()
    assert (stream.text, stream.finish, stream.done) == (long, "length", True)
    assert client.text(SHORT) == long[: len(client.text(SHORT))]


def test_a_drain_without_time_cuts_off_and_says_so(serving: Open) -> None:
    server, client = serving(drain_timeout=0.0)
    long = client.text(LONG)
    with client.stream() as response:
        stream = events(response).read(3)
        server.signal()
        broke_off(stream.read(), long)


# ------------------------------------------------------------------------------ whole processes


def test_killed_started_again_and_told_to_end(speaking_model: Path) -> None:
    """SIGKILL in mid-stream, another server on the same port, SIGTERM in mid-stream."""
    port = free_port()
    open_one = partial(Served, speaking_model, "--memory", "1GiB", "--max-context", "512", port=port)
    with open_one() as server:
        server.wait_until_ready()
        client = Client(server.url)
        long = client.text(LONG)
        with pytest.raises(httpx2.HTTPError), client.stream() as response:
            stream = events(response).read(1)
            server.kill()
            stream.read()
        assert (stream.finish, stream.done) == (None, False)
    with open_one() as server:
        server.wait_until_ready()
        client = Client(server.url)
        with client.stream() as response:
            stream = events(response).read(1)
            server.terminate()
            until(lambda: server.health() in (503, None))
            stream.read()
        assert (stream.text, stream.finish, stream.done) == (long, "length", True)
        assert server.wait() == 0, server.said
        assert "Traceback" not in server.said
