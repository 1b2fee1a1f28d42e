"""Five hundred malformed or hostile requests: each is told what is wrong with it, in the envelope.

The generator is seeded: what fails once fails again.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from serve.conftest import Client
from serve.fake_batch import FakeBatch

from understudy.serve.intake import parse

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
JSON = {"Content-Type": "application/json"}
Request = tuple[str, bytes, dict[str, str]]  # path, body, headers

GOOD: dict[str, dict[str, Any]] = {
    CHAT: {"model": "coarse", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4},
    TEXT: {"model": "coarse", "prompt": "Hi", "max_tokens": 4},
    "/tokenize": {"prompt": "Hi"},
    "/detokenize": {"tokens": [1, 2]},
}


def raw_bodies(rng: random.Random) -> Iterator[bytes]:
    """What is not even JSON, or JSON that parsers disagree about."""
    good = json.dumps(GOOD[CHAT]).encode()
    yield from (b"", b" ", b"{", b"}", b"[", b"null", b"1", b'"x"', b"[]", b"true", b"\x00", b"{}}")
    yield from (good + b",", good + good, b"\xef\xbb\xbf" + good, good.replace(b'"', b"'"))
    yield from (b"\xff\xfe" + good, good.decode().encode("utf-16"), b"\x80", b'{"a": "\xc3"}')
    for _ in range(60):  # cut off somewhere
        yield good[: rng.randrange(1, len(good))]
    for _ in range(40):  # a byte that no UTF-8 has
        at = rng.randrange(1, len(good))
        yield good[:at] + bytes([rng.choice([0xC0, 0xC1, 0xF5, 0xFF])]) + good[at:]
    for number in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "01", "1.", ".5"):
        yield b'{"prompt": "x", "temperature": %s}' % number.encode()
    for depth in (65, 100, 1000, 50_000):
        yield b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}"
        yield b'{"prompt": "x", "metadata": ' + b'{"a":' * depth + b"1" + b"}" * depth + b"}"
        yield b"[" * depth
    for key in ("prompt", "model", "temperature"):
        yield b'{"prompt": "x", "%s": null, "%s": "y"}' % (key.encode(), key.encode())
    for half in (r"\ud800", r"\udfff", r"a\ud83d", r"\ude00b", r"\udc00\ud800"):
        yield b'{"prompt": "%s"}' % half.encode()
        yield b'{"prompt": "x", "stop": ["%s"]}' % half.encode()
        yield b'{"prompt": "x", "%s": 1}' % half.encode()
        yield b'{"messages": [{"role": "user", "content": "%s"}]}' % half.encode()


WRONG: list[Callable[[random.Random], Any]] = [
    lambda r: True,
    lambda r: -(2 ** r.randrange(63, 2000)),
    lambda r: 2 ** r.randrange(63, 2000),
    lambda r: r.uniform(-1e300, 1e300),
    lambda r: "x" * r.randrange(1, 4000) + "\x00",
    lambda r: [],
    lambda r: [[]],
    lambda r: [None],
    lambda r: {},
    lambda r: {"": {}},
    lambda r: ["\U0010ffff"] * r.randrange(17, 2000),
    lambda r: [r.choice([1.5, "a", None, [], {}]) for _ in range(r.randrange(1, 2000))],
    lambda r: {str(i): r.choice([None, "x", [], 1e200]) for i in range(r.randrange(1, 2000))},
    lambda r: "../../etc/passwd",
    lambda r: {"type": r.choice(["function", "json_schema", "text"]), "x": 1},
]

# Fields, and which of the wrong values happen to be right for them.
NUMBERS = (
    "temperature", "top_p", "top_k", "min_p", "n", "max_tokens", "min_tokens", "presence_penalty",
    "frequency_penalty", "repetition_penalty",
)  # fmt: skip
CHAT_ONLY = ("messages", "top_logprobs", "tools", "tool_choice", "response_format")


def wrong_fields(rng: random.Random) -> Iterator[Request]:
    """A good request with one field that is wrong."""
    for field in (*NUMBERS, *CHAT_ONLY, "model", "stop_token_ids", "logit_bias", "understudy"):
        for _ in range(14):
            path = CHAT if field in CHAT_ONLY else rng.choice([CHAT, TEXT])
            value = rng.choice(WRONG)(rng)
            if not might_be_right(field, value):
                yield path, json.dumps({**GOOD[path], field: value}).encode(), JSON
    for path in GOOD:
        for _ in range(12):
            name = "".join(rng.choices("abcdefghij_ \x00é", k=rng.randrange(9)))
            yield path, json.dumps({**GOOD[path], name: 1}).encode(), JSON


def might_be_right(field: str, value: Any) -> bool:
    return (
        (field == "understudy" and value is True)
        or (field in ("stop_token_ids", "tools") and value == [])
        or (field == "logit_bias" and value == {})
        or (field == "response_format" and value == {})
    )


def bad_schemas(rng: random.Random) -> Iterator[Any]:
    yield from ({"type": "strin"}, {"$ref": "#/x"}, {"pattern": "("}, {"type": []}, {"enum": 5})
    yield from ({"minimum": 5, "maximum": 1, "type": "integer"}, {"properties": 3}, {"items": 1})
    yield from ({"allOf": "x"}, {"if": 1})
    yield {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    yield {"enum": ["x" * 100_000]}
    for depth in (33, 60):
        schema: Any = {"type": "integer"}
        for _ in range(depth):
            schema = {"anyOf": [schema]}
        yield schema


def headers(rng: random.Random) -> Iterator[dict[str, str]]:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "json"):
        yield {"Content-Type": kind}
    yield {"Content-Type": "application/json; charset=utf-16"}
    yield {"Content-Type": "application/json\\"}
    yield {}


def hostile(seed: int = 20261126) -> list[Request]:
    rng = random.Random(seed)
    made = [(CHAT if b"messages" in body else TEXT, body, JSON) for body in raw_bodies(rng)]
    made += wrong_fields(rng)
    for schema in bad_schemas(rng):
        shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        made.append((CHAT, json.dumps({**GOOD[CHAT], "response_format": shape}).encode(), JSON))
    made += [(TEXT, json.dumps(GOOD[TEXT]).encode(), h) for h in headers(rng)]
    for count in (129, 5000, 100_000):
        made.append((TEXT, json.dumps({"prompt": ["x"] * count}).encode(), JSON))
        made.append((TEXT, json.dumps({"prompt": [1] * count + [None]}).encode(), JSON))
        made.append((TEXT, json.dumps({"prompt": "x", "stop": ["x"] * count}).encode(), JSON))
        messages = [{"role": "x", "content": 1}] * count
        made.append((CHAT, json.dumps({"messages": messages}).encode(), JSON))
        made.append(("/detokenize", json.dumps({"tokens": [-1] * count}).encode(), JSON))
    made.append((TEXT, json.dumps({"prompt": "x" * (9 << 20)}).encode(), JSON))
    return made


def test_five_hundred_hostile_requests(client: Client, batch: FakeBatch) -> None:
    requests = hostile()
    assert len(requests) >= 500, len(requests)

    async def ask_all() -> None:
        transport = httpx.ASGITransport(client.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as asking:
            for path, body, more in requests:
                started = time.perf_counter()
                response = await asking.post(path, content=body, headers=more)
                check(response, path, body)
                assert time.perf_counter() - started < 5, body[:200]

    asyncio.run(ask_all())
    assert batch.running == 0


def check(response: httpx.Response, path: str, body: bytes) -> None:
    what = f"{path} {body[:300]!r}: {response.status_code} {response.text[:200]}"
    assert 400 <= response.status_code < 500, what
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"], what
    assert len(response.content) < 2000, what
    for leak in ("Traceback", "/root", "site-packages", "pydantic", "0x7"):
        assert leak not in response.text, what


# What costs more than the body it came in: measured in CPU time, and far below what it once took.
COSTLY: dict[str, tuple[str, bytes, str]] = {
    "a key twice among many": (
        TEXT,
        b"{%s, \"x\": 0, \"x\": 0}" % b", ".join(b'"%d": 0' % i for i in range(20_000)),
        "more than 4096 keys",
    ),
    "fields by the hundred thousand": (
        TEXT, b"{%s}" % b", ".join(b'"%d": 0' % i for i in range(200_000)), "more than 4096 keys",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COSTLY)
def test_a_small_body_costs_little(client: Client, name: str) -> None:
    path, body, said = COSTLY[name]
    before = time.process_time()
    response = client.send("POST", path, content=body, headers=JSON)
    assert time.process_time() - before < 1
    assert response.status_code == 400 and said in response.json()["error"]["message"]


def history(arguments: str) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    said = {"role": "assistant", "content": None, "tool_calls": [call]}
    return {"messages": [{"role": "user", "content": "Hi"}, said], "max_tokens": 1}


def test_arguments_of_a_call_that_are_no_arguments(client: Client) -> None:
    for wrong in ("[" * 100_000, '{"a":' * 5_000, '"\\ud800"', "9" * 5000):
        check(client.post(CHAT, history(wrong)), CHAT, wrong[:20].encode())


def test_arguments_and_tools_are_a_part_of_the_prompt(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megabytes are refused before anybody tries to tokenize them."""
    monkeypatch.setattr(type(client.stage.require().tools), "render", pytest.fail)
    tool = {"name": "f", "parameters": {"type": "object", "description": "word and " * 5000}}
    tools = {**GOOD[CHAT], "tools": [{"type": "function", "function": tool}]}
    for body in (history("word and " * 100_000), tools):
        response = client.post(CHAT, body)
        assert response.json()["error"]["code"] == "context_length_exceeded"


def test_what_is_json_is_read() -> None:
    value = {"a": [1, 2.5, None, True, "\U0001f600é\x00"], "b": {"c": "ud800"}}
    assert parse(json.dumps(value).encode()) == value
    assert parse(json.dumps(value, ensure_ascii=False).encode()) == value
    assert parse(b'"' + rb"\ud83d\ude00" + b'"') == "\U0001f600"
