"""What a chat may look like, and what it is told when it may not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from serve.conftest import Client
from serve.fake_batch import FakeBatch

USER = {"role": "user", "content": "Hi"}


def said(tokenizer: Any, batch: FakeBatch) -> str:
    """The prompt of the last ask."""
    text: str = tokenizer.decode(batch.asks[-1].prompt)
    return text


def test_parts_of_text_are_joined(client: Client, batch: FakeBatch, tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]
    assert client.chat(parts).status_code == 200
    assert said(tokenizer, batch) == "Question: Hi\nthere\nAnswer:"


def test_the_last_message_may_go_on(client: Client, batch: FakeBatch, tokenizer: Any) -> None:
    messages = [USER, {"role": "assistant", "content": "Well"}]
    body = {"messages": messages, "continue_final_message": True}
    assert client.post("/v1/chat/completions", body).status_code == 200
    assert said(tokenizer, batch) == "Question: Hi\nAnswer: Well"


def test_a_template_of_ones_own(batch: FakeBatch, tokenizer: Any) -> None:
    client = Client(batch, chat_template="{{ colour }}: {{ messages[0].content }}")
    client.chat("Hi", chat_template_kwargs={"colour": "red"})
    assert said(tokenizer, batch) == "red: Hi"


def test_what_a_template_refuses_is_a_400(batch: FakeBatch) -> None:
    client = Client(batch, chat_template="{{ raise_exception('roles must alternate') }}")
    response = client.chat()
    assert response.status_code == 400
    assert "roles must alternate" in response.json()["error"]["message"]
    broken = Client(batch, chat_template="{{ messages[7].content + 1 }}")
    assert broken.chat().status_code == 400


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "tools", "conversation"])
def test_a_client_cannot_bring_a_program(client: Client, name: str) -> None:
    response = client.chat(chat_template_kwargs={name: "{{ 1 }}"})
    assert response.status_code == 400 and name in response.json()["error"]["message"]


def test_what_the_experts_did(client: Client) -> None:
    for told in (
        client.chat(understudy=True).json()["understudy"],
        client.post("/v1/completions", {"prompt": "Hi"}, headers={"X-Understudy": "1"}).json()[
            "understudy"
        ],
    ):
        assert (told["hits"], told["late"], told["misses"], told["hit_rate"]) == (30, 5, 5, 0.75)
        assert told["bytes_read"] == 100 and told["mean_batch"] == 1.5
    assert "understudy" not in client.chat().json()
    assert len(client.chat(understudy=True, n=2).json()["understudy"]["answers"]) == 2


@pytest.mark.parametrize("options", [{}, {"stream_options": {"include_usage": True}}])
def test_the_last_piece_says_what_the_experts_did(client: Client, options: Any) -> None:
    text = client.chat(understudy=True, stream=True, n=2, **options).text
    *_, before, last, done = [line[6:] for line in text.split("\n\n") if line]
    assert done == "[DONE]"
    assert len(json.loads(last)["understudy"]["answers"]) == 2
    assert "understudy" not in json.loads(before)


# What is refused: the field, and a value that asks for something.
UNSUPPORTED = {
    "audio": {"voice": "alloy"},
    "modalities": ["text", "audio"],
    "prediction": {"type": "content", "content": "x"},
    "best_of": 2,
    "suffix": "end",
    "service_tier": "flex",
    "store": True,
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "reasoning_effort": "high",
    "verbosity": "low",
    "web_search_options": {},
    "logits_processors": ["x"],
    "prompt_logprobs": 1,
    "guided_json": {},
    "never_heard_of": 1,
}
# What asks for nothing, and is sent by clients all the same.
HARMLESS = {
    "user": "me",
    "metadata": {"a": "b"},
    "safety_identifier": "x",
    "prompt_cache_key": "y",
    "parallel_tool_calls": True,
    "best_of": 1,
    "store": False,
    "service_tier": "auto",
    "modalities": ["text"],
    "tools": [],
    "stop": [],
    "logit_bias": {},
    "response_format": {"type": "text"},
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_refused_by_name(client: Client, batch: FakeBatch, field: str) -> None:
    response = client.chat(**{field: UNSUPPORTED[field]})
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == field
    assert error["message"] == f"'{field}' is not supported by this server"
    assert not batch.asks


def test_what_asks_for_nothing_is_accepted(client: Client) -> None:
    assert client.chat(**HARMLESS).status_code == 200
    nothing = dict.fromkeys([*UNSUPPORTED, *HARMLESS])
    for name in ("guided_json", "never_heard_of"):  # not even that, if nobody knows the name
        del nothing[name]
    more = dict.fromkeys(["temperature", "top_p", "n", "seed", "stream", "max_tokens", "logprobs"])
    assert client.chat(**nothing, **more).status_code == 200


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"n": True}, "n"),
    ({"n": 1.0}, "n"),
    ({"n": 0}, "n"),
    ({"n": 10**30}, "n"),
    ({"temperature": "1"}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_k": 1.5}, "top_k"),
    ({"seed": 1 << 63}, "seed"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"min_tokens": 600}, "min_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": "x" * 513}, "stop"),
    ({"stop": 5}, "stop"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"5": True}}, "logit_bias"),
    ({"logit_bias": {"999999": 1}}, "logit_bias"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0]"),
    ({"messages": [USER, {**USER, "extra": 1}]}, "messages[1].extra"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"stream_options": {"include_usage": True, "x": 1}, "stream": True}, "stream_options.x"),
    ({"metadata": {"a": 1}}, "metadata.a"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=lambda v: str(v)[:40])
def test_what_is_wrong_is_named(
    client: Client, batch: FakeBatch, fields: dict[str, Any], param: str
) -> None:
    response = client.chat(**fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert error["type"] == "invalid_request_error" and param.split("[")[0] in error["message"]
    assert not batch.asks


@pytest.mark.parametrize(
    "fields",
    [
        {"stream_options": {"include_usage": True}},
        {"top_logprobs": 2},
        {"max_tokens": 1, "max_completion_tokens": 2},
        {"tool_choice": "required"},
        {"continue_final_message": True},
        {"tool_choice": "auto", "tools": "x"},
    ],
    ids=str,
)
def test_fields_that_contradict_each_other(client: Client, fields: dict[str, Any]) -> None:
    assert client.chat(**fields).status_code == 400


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [nested(40), {"enum": ["x" * 70_000]}, {"type": "nonsense"}, {"$ref": "#/nowhere"}],
    ids=["deep", "large", "no type", "no target"],
)
def test_a_schema_that_cannot_be_used(client: Client, schema: dict[str, Any]) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    response = client.chat(response_format=shape)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"].startswith("response_format")


def test_the_model_is_called_by_its_names(client: Client) -> None:
    assert client.chat(model="alias").json()["model"] == "alias"
    assert client.chat().json()["model"] == "coarse"
    # As on the command line; but what it is called there is never shown to anybody else.
    assert client.chat(model="/home/somebody/coarse").status_code == 200
    error = client.chat(model="other").json()["error"]
    assert error["code"] == "model_not_found" and "/home" not in error["message"]
