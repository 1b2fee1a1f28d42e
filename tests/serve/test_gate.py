"""API keys, request ids, other sites' pages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from serve.conftest import Client
from serve.fake_batch import FakeBatch

GUARDED = ["/v1/models", "/v1/models/coarse", "/tokenizer_info", "/nowhere", "/v1/completions"]


@pytest.mark.parametrize("key", ["s3cret", "schlüssel", "ключ"])
def test_who_knows_the_key_comes_in(batch: FakeBatch, key: str) -> None:
    client = Client(batch, api_key=key)
    header = [(b"authorization", b"Bearer " + key.encode())]
    assert client.get("/v1/models", headers=header).status_code == 200
    latin = key.encode("latin-1", errors="replace")
    known = client.get("/v1/models", headers=[(b"authorization", b"bearer " + latin)])
    assert known.status_code == (401 if b"?" in latin else 200)


@pytest.mark.parametrize(
    "value",
    [b"", b"Bearer", b"Bearer ", b"Bearer s3cre", b"Bearer s3cret1", b"s3cret", b"\xff\xfe"],
)
def test_nobody_else(batch: FakeBatch, value: bytes) -> None:
    client = Client(batch, api_key="s3cret")
    for path in GUARDED:
        response = client.get(path, headers=[(b"authorization", value)])
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    twice = [(b"authorization", b"Bearer s3cret"), (b"authorization", b"Bearer x")]
    assert client.get("/v1/models", headers=twice).status_code == 401
    assert client.post("/v1/chat/completions", {}).status_code == 401


def test_probes_need_no_key(batch: FakeBatch) -> None:
    client = Client(batch, api_key="s3cret")
    for path in ("/health", "/ping", "/version", "/openapi.json"):
        assert client.get(path).status_code == 200
    assert client.send("HEAD", "/health").status_code == 200


def test_every_response_has_the_id_of_its_request(client: Client) -> None:
    for path in ("/health", "/nowhere", "/v1/chat/completions"):
        assert len(client.get(path).headers["x-request-id"]) == 32
        own = client.get(path, headers={"x-request-id": "mine-1"})
        assert own.headers["x-request-id"] == "mine-1"
    strange = client.get("/health", headers={"x-request-id": "a b" * 100})
    assert len(strange.headers["x-request-id"]) == 32


@pytest.mark.filterwarnings("ignore")
def test_what_nobody_has_foreseen_is_an_answer_like_any_other(
    batch: FakeBatch, caplog: pytest.LogCaptureFixture
) -> None:
    client = Client(batch, allowed_origins=("http://ui.example",))
    counted: list[tuple[str, int]] = []
    counting: Any = SimpleNamespace(on_response=lambda *told: counted.append(told))
    client.stage.metrics = counting

    @client.app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("/secret/path")

    headers = {"Origin": "http://ui.example", "x-request-id": "mine"}
    response = client.get("/broken", headers=headers)
    assert (response.status_code, response.headers["x-request-id"]) == (500, "mine")
    assert response.headers["access-control-allow-origin"] == "http://ui.example"
    assert response.json()["error"]["code"] == "internal_error" and "secret" not in response.text
    assert counted == [("/broken", 500)]
    assert len(caplog.records) == 1 and "/secret/path" in caplog.text


def test_pages_of_other_sites_are_kept_out(client: Client) -> None:
    headers = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    preflight = client.send("OPTIONS", "/v1/chat/completions", headers=headers)
    assert preflight.status_code == 405
    assert "access-control-allow-origin" not in preflight.headers
    # What a page may send without asking first is no JSON.
    simple = client.send(
        "POST", "/v1/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"}
    )
    assert simple.status_code == 415


def test_unless_they_are_allowed(batch: FakeBatch) -> None:
    client = Client(batch, allowed_origins=("http://ui.example",), api_key="s3cret")
    headers = {
        "Origin": "http://ui.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    preflight = client.send("OPTIONS", "/v1/chat/completions", headers=headers)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "http://ui.example"
    refused = client.get("/v1/models", headers={"Origin": "http://ui.example"})
    assert refused.status_code == 401  # and the page may read why
    assert refused.headers["access-control-allow-origin"] == "http://ui.example"
    stranger = client.get("/health", headers={"Origin": "http://evil.example"})
    assert "access-control-allow-origin" not in stranger.headers


def test_wrong_methods_say_which_are_right(client: Client) -> None:
    response = client.send("PUT", "/v1/chat/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error"]["code"] == "method_not_allowed"
