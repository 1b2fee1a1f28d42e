"""What goes wrong behind HTTP: a client is told so, in the status or in the stream, and never takes
half an answer for a whole one. (Signals, from outside: `tests/serve/test_process.py`.)"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx2
import pytest
from faults.test_running import Disk, cut
from serve.conftest import Running, until

from bench.clients import Clients, jobs
from understudy.batch import Ask, Report, StepReport
from understudy.batch.opening import start

BODY = {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
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

    def whole(self, body: dict[str, Any] = BODY) -> httpx2.Response:
        return self.http.post("/v1/completions", json=body)

    def text(self, body: dict[str, Any] = BODY) -> str:
        response = self.whole(body)
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        assert choice["finish_reason"] == "length"
        return str(choice["text"])

    @contextmanager
    def stream(self, body: dict[str, Any] = BODY) -> Iterator[Stream]:
        """An answer that has begun."""
        asked = {**body, "stream": True}
        with self.http.stream("POST", "/v1/completions", json=asked) as response:
            assert response.status_code == 200
            yield Stream(event.data for event in httpx2.EventSource(response))

    def health(self) -> int:
        return self.http.get("/health").status_code


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


class Saboteur:
    """An observer of the engine: does something in the middle of the next answer."""

    def __init__(self, server: Running, act: Callable[[], object]) -> None:
        self.act, self.left = act, 5
        engine_of(server).add_observer(self)

    def on_token(self, seconds: float) -> None:
        self.left -= 1
        if self.left == 0:
            self.act()

    def on_step(self, step: StepReport) -> None:
        pass

    def on_finish(self, ask: Ask, finish: str, report: Report) -> None:
        pass


def broke_off(client: Client, whole: str) -> None:
    """The next streamed answer says that it has failed, it does not claim to be finished, and
    nothing in it was wrong."""
    with client.stream() as stream:
        stream.read()
    assert stream.error is not None
    assert stream.error["message"]
    assert stream.finish is None
    assert 0 < len(stream.text) < len(whole)
    assert whole.startswith(stream.text)
    assert "secret-place" not in str(stream.error)


def refused(client: Client, status: int) -> str:
    """The message of the error that the next answer is."""
    response = client.whole()
    assert response.status_code == status
    assert "secret-place" not in response.text
    return str(response.json()["error"]["message"])


def test_a_disk_that_fails_for_a_while(serving: Open) -> None:
    server, client = serving()
    text, disk = client.text(), Disk(engine_of(server).engine.model)
    Saboteur(server, lambda: setattr(disk, "fails", lambda: True))
    broke_off(client, text)
    assert "disk" in refused(client, 500)
    assert client.health() == 200  # disks may come back
    disk.fails = lambda: False
    assert client.text() == text


def test_a_shard_that_is_cut(serving: Open, folder: Path) -> None:
    server, client = serving()
    text, (weights,) = client.text(), folder.glob("*.safetensors")
    Saboteur(server, lambda: cut(weights))
    broke_off(client, text)
    assert "disk" in refused(client, 500)


def test_a_dead_engine_is_told_by_health_and_to_everybody(
    serving: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Sequence[Any]:
        raise RuntimeError("a bug in secret-place")

    server, client = serving()
    text, scheduler = client.text(), engine_of(server)._scheduler
    Saboteur(server, lambda: monkeypatch.setattr(scheduler, "next", broken))
    broke_off(client, text)
    assert client.health() == 503
    assert "restarted" in refused(client, 503)


@pytest.mark.parametrize("jump", [-3e8, 3e8])
def test_a_jump_of_the_clock_changes_nothing(
    serving: Open, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    limits = {"request_timeout": 50.0, "body_timeout": 50.0, "write_timeout": 50.0}
    server, client = serving(**limits)
    text, real = client.text(), time.time
    Saboteur(server, lambda: monkeypatch.setattr(time, "time", lambda: real() + jump))
    with client.stream() as stream:
        stream.read()
    assert (stream.text, stream.finish, stream.done) == (text, "length", True)
    assert client.text() == text


def test_a_drain_without_time_cuts_off_and_says_so(serving: Open) -> None:
    server, client = serving(drain_timeout=0.0)
    text = client.text()
    Saboteur(server, server.signal)
    broke_off(client, text)


def test_many_clients_some_of_them_careless(serving: Open) -> None:
    """`bench/load.py` in small: every answer is the one given alone, whoever else is there."""
    server, _ = serving()

    async def live() -> Clients:
        async with httpx2.AsyncClient(base_url=server.url, timeout=60.0, trust_env=False) as http:
            alone = Clients(http, (), seed=0)
            asked = jobs(range(3, 259), ("a", "A longer text. " * 9), 300, Random(0))
            clients = Clients(http, [await alone.ask_alone(job) for job in asked], seed=0)
            await clients.live(8, seconds=1.5)
            return clients

    outcome = asyncio.run(live()).outcome
    assert outcome.wrong == []
    assert outcome.mismatches == []
    assert outcome.counts["greedy"] > 8
    until(lambda: engine_of(server).snapshot().running == 0)
