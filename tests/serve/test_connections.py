"""Clients that leave, stall or talk nonsense; an engine that stops; a server that is told to go."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from collections.abc import Iterator

import httpx
import pytest
from serve.conftest import Running, running, settings, until
from serve.fake_batch import FakeBatch

from understudy.batch import Ask
from understudy.core import ReadFailed, UnderstudyError
from understudy.serve import run
from understudy.serve.answers import Answers
from understudy.serve.served import Served

USER = [{"role": "user", "content": "Hi"}]
ENDLESS = {"messages": USER, "ignore_eos": True, "stream": True}


def request(body: object, path: str = "/v1/chat/completions", extra: str = "") -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{extra}"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def read_all(connection: socket.socket) -> bytes:
    """Until the server closes."""
    got = b""
    while piece := connection.recv(65536):
        got += piece
    return got


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def error(answer: bytes) -> dict[str, str]:
    told: dict[str, str] = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    return told


# ----------------------------------------------------------------------------- clients that leave


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(
    server: Running, batch: FakeBatch, stream: bool
) -> None:
    batch.pace = 0.01
    with server.connect() as connection:
        connection.sendall(request({**ENDLESS, "stream": stream, "n": 2}))
        until(lambda: batch.running == 2)
    until(lambda: batch.running == 0)
    assert batch.cancelled == 2


def test_a_client_that_is_cut_off_frees_its_place(server: Running, batch: FakeBatch) -> None:
    batch.silent = True
    connection = server.connect()
    connection.sendall(request(ENDLESS))
    until(lambda: batch.running == 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()  # a reset, no farewell
    until(lambda: batch.running == 0)


# ------------------------------------------------------------------------------ clients that stall


def test_a_client_that_reads_nothing_is_cut_off(batch: FakeBatch) -> None:
    batch.context, batch.pace = 1 << 20, 0.0002
    with running(batch, write_timeout=0.2, backlog=1 << 20) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(request({**ENDLESS, "logprobs": True, "top_logprobs": 20}))
        until(lambda: batch.running == 1)
        until(lambda: batch.running == 0, seconds=10)
        until(lambda: not server.server.server_state.connections)
        connection.close()


def test_a_client_that_reads_slowly_gets_all(batch: FakeBatch) -> None:
    """A large answer over a slow network takes longer than a client may be stuck."""
    batch.context = 1 << 20
    asked = {"prompt": "Hi", "ignore_eos": True, "max_tokens": 1500, "logprobs": 20}
    with running(batch, write_timeout=0.2, backlog=1 << 20) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(5)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(request(asked, "/v1/completions", "Connection: close\r\n"))
        got, pause = [connection.recv(65536)], threading.Event()
        for _ in range(10):
            pause.wait(0.05)
            got.append(connection.recv(16384))
        answer = b"".join(got) + read_all(connection)
        connection.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}".encode() in head and len(body) > 250_000


def test_a_client_that_lags_too_far_behind_is_cut_off(batch: FakeBatch) -> None:
    batch.context, batch.pace = 1 << 20, 0.0002
    with running(batch, backlog=100) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(request(ENDLESS, extra="Connection: close\r\n"))
        until(lambda: batch.running == 1)
        until(lambda: batch.running == 0, seconds=10)
        assert b"the client reads too slowly" in read_all(connection)
        connection.close()


def test_many_answers_may_lag_as_many_steps_as_one(batch: FakeBatch) -> None:
    """A loop that was busy for a while is not its client's fault."""

    async def read_late() -> int:
        answers = Answers(Served.of(batch, settings(backlog=50)))
        answers.submit([Ask((1,), 40, ignore_eos=True) for _ in range(8)])
        until(lambda: batch.running == 0)  # nothing can be read meanwhile
        return len([arrived async for arrived in answers.deltas(8) if arrived])

    assert asyncio.run(read_late()) == 8 * 40


def test_a_body_must_arrive_in_time(batch: FakeBatch) -> None:
    with running(batch, body_timeout=0.1) as server, server.connect() as connection:
        connection.sendall(request({"messages": USER})[:-5])
        answer = read_all(connection)
        assert (status(answer), error(answer)["code"]) == (408, "body_timeout")


def test_so_must_the_headers(batch: FakeBatch) -> None:
    with running(batch, body_timeout=0.1) as server:
        with server.connect() as connection, pytest.raises(ConnectionResetError):
            connection.sendall(b"POST /v1/chat")
            assert read_all(connection) == b""
            raise ConnectionResetError
        until(lambda: not server.server.server_state.connections)


def test_a_silent_stream_is_kept_alive(server: Running, batch: FakeBatch) -> None:
    batch.silent = True
    with server.connect() as connection:
        connection.sendall(request(ENDLESS))
        got = b""
        while b": ping\n\n" not in got:
            got += connection.recv(4096)
        assert status(got) == 200


# ------------------------------------------------------------------- bodies and what is not HTTP


@pytest.mark.parametrize("chunked", [True, False])
def test_a_body_that_is_too_large(batch: FakeBatch, chunked: bool) -> None:
    with running(batch, max_body_size=1000) as server:
        body = json.dumps({"prompt": "x" * 5000}).encode()
        content = iter([body[:2000], body[2000:]]) if chunked else body
        response = httpx.post(
            server.url + "/v1/completions",
            content=content,
            headers={"Content-Type": "application/json"},
        )
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"


def test_a_chunked_body(server: Running) -> None:
    body = json.dumps({"messages": USER}).encode()
    response = httpx.post(
        server.url + "/v1/chat/completions",
        content=iter([body[:5], body[5:]]),
        headers={"Content-Type": "application/json"},
    )
    assert response.status_code == 200


def test_what_is_no_http_is_told_so_in_the_envelope(server: Running) -> None:
    for nonsense in (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET / HTTP/9\r\n\r\n"):
        with server.connect() as connection:
            connection.sendall(nonsense)
            answer = read_all(connection)
        assert (status(answer), error(answer)["code"]) == (400, "invalid_http")


# ------------------------------------------------------------------------- an engine that stops


def test_the_engine_dies_while_it_answers(server: Running, batch: FakeBatch) -> None:
    batch.silent = True
    answers: list[httpx.Response] = []
    url = server.url + "/v1/chat/completions"
    asking = threading.Thread(
        target=lambda: answers.append(httpx.post(url, json={"messages": USER}, timeout=10))
    )
    asking.start()
    until(lambda: batch.running == 1)
    batch.die(telling=False)  # without a last word to anybody
    asking.join(5)
    later = httpx.post(url, json={"messages": USER})
    health = httpx.get(server.url + "/health")
    for response in (*answers, later, health):
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_dead"
        assert "secret" not in response.text and "Traceback" not in response.text
    assert len(answers) == 1


@pytest.mark.parametrize(
    "failure", [ReadFailed("/secret/model.safetensors: no"), RuntimeError("/secret/x")]
)
def test_what_fails_inside_is_not_told_outside(
    server: Running, batch: FakeBatch, failure: Exception
) -> None:
    batch.fails = failure
    response = httpx.post(server.url + "/v1/chat/completions", json={"messages": USER})
    assert response.status_code == 500 and "secret" not in response.text
    assert response.json()["error"]["type"] == "server_error"
    stream = httpx.post(
        server.url + "/v1/chat/completions", json={"messages": USER, "stream": True}
    )
    assert '"type":"server_error"' in stream.text and "secret" not in stream.text
    assert stream.text.endswith("data: [DONE]\n\n")


def test_a_request_may_have_a_deadline(batch: FakeBatch) -> None:
    batch.silent = True
    with running(batch, request_timeout=0.1) as server:
        response = httpx.post(server.url + "/v1/chat/completions", json={"messages": USER})
        assert response.status_code == 504 and response.headers["x-should-retry"] == "false"
        until(lambda: batch.running == 0)


# ------------------------------------------------------------------------------- coming and going


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    opened = threading.Event()
    yield opened
    opened.set()


def test_while_it_loads(batch: FakeBatch, gate: threading.Event) -> None:
    def start(say: run.Say) -> FakeBatch:
        gate.wait(10)
        return batch

    server = Running(start)
    for path in ("/health", "/ping", "/v1/models", "/metrics"):
        response = httpx.get(server.url + path)
        assert response.status_code == 503, path
        assert response.json()["error"]["code"] == "loading"
        assert int(response.headers["retry-after"]) > 0
    response = httpx.post(server.url + "/v1/chat/completions", json={"messages": USER})
    assert response.status_code == 503
    gate.set()
    server.wait_until_ready()
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}
    until(lambda: bool(server.said))
    assert server.said[-1].startswith(f"ready: {server.url}")
    server.stop()


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    def start(say: run.Say) -> FakeBatch:
        raise UnderstudyError("no such model")

    server = Running(start)
    server.thread.join(5)
    assert str(server.server.failure) == "no such model"


def test_what_runs_is_finished_after_a_signal(batch: FakeBatch) -> None:
    batch.pace = 0.03
    server = Running(lambda say: batch, drain_timeout=5.0)
    server.wait_until_ready()
    with httpx.Client(base_url=server.url) as client:
        body = {"messages": USER, "stream": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            server.signal()
            until(lambda: server.stage.draining)
            late = httpx.post(server.url + "/v1/chat/completions", json={"messages": USER})
            assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
            assert httpx.get(server.url + "/health").status_code == 503
            rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and '"finish_reason":"stop"' in rest[-2]
    server.thread.join(5)
    assert not server.thread.is_alive() and not server.server.force_exit


def test_what_is_not_finished_in_time_is_told_so(batch: FakeBatch) -> None:
    batch.silent = True
    server = Running(lambda say: batch, drain_timeout=0.1)
    server.wait_until_ready()
    answers: list[httpx.Response] = []
    url = server.url + "/v1/chat/completions"
    asking = threading.Thread(
        target=lambda: answers.append(httpx.post(url, json={"messages": USER}, timeout=10))
    )
    asking.start()
    until(lambda: batch.running == 1)
    server.signal()
    asking.join(5)
    assert answers[0].status_code == 503
    server.thread.join(5)
    assert not server.thread.is_alive()
    assert any("cut off" in line for line in server.said)


def test_a_second_signal_leaves_at_once(batch: FakeBatch) -> None:
    batch.silent = True
    server = Running(lambda say: batch, drain_timeout=60.0)
    server.wait_until_ready()
    with server.connect() as connection:
        connection.sendall(request(ENDLESS))
        until(lambda: batch.running == 1)
        server.stop()
    assert server.server.force_exit


def test_a_port_that_is_taken_is_said_in_one_line(server: Running) -> None:
    with pytest.raises(UnderstudyError, match=f"port {server.port}: Address already in use"):
        run.listen("127.0.0.1", server.port)


def test_nor_does_it_wait_for_a_thread_that_is_stuck(
    batch: FakeBatch, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grammar that takes minutes to compile, a disk that does not answer."""
    begun = threading.Event()

    def submit(*given: object) -> None:
        begun.set()
        gate.wait(20)

    monkeypatch.setattr(batch, "submit", submit)
    server = Running(lambda say: batch)
    server.wait_until_ready()
    with server.connect() as connection:
        connection.sendall(request(ENDLESS))
        assert begun.wait(5)
        server.stop()
