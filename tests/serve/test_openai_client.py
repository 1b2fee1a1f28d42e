"""The official `openai` client against a real port; the engine behind it is a script."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from serve.conftest import Running, running
from serve.fake_batch import WORDS, FakeBatch

openai = pytest.importorskip("openai")

USER = [{"role": "user", "content": "Count for me."}]


@pytest.fixture
def ai(server: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0) as client:
        yield client


def test_a_chat(ai: Any, batch: FakeBatch) -> None:
    made = ai.chat.completions.create(model="coarse", messages=USER, max_completion_tokens=4)
    choice = made.choices[0]
    assert choice.message.content == " one two three four"
    assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
    assert made.usage.completion_tokens == 4
    assert made.usage.total_tokens == made.usage.prompt_tokens + 4
    assert made.usage.prompt_tokens_details.cached_tokens == 3
    assert batch.asks[0].max_new_tokens == 4


def test_an_answer_may_be_as_long_as_the_context(ai: Any, batch: FakeBatch) -> None:
    assert ai.chat.completions.create(model="coarse", messages=USER).choices[0].message.content
    assert batch.asks[0].max_new_tokens == batch.context - len(batch.asks[0].prompt)


def test_a_stream_says_the_same(ai: Any) -> None:
    chunks = list(
        ai.chat.completions.create(
            model="coarse", messages=USER, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == WORDS
    assert [c.choices[0].delta.role for c in chunks[:-1]][:2] == ["assistant", None]
    assert [c.choices[0].finish_reason for c in chunks[:-1]][-1] == "stop"
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 12
    assert len({c.id for c in chunks}) == 1


def test_several_answers_have_seeds_of_their_own(ai: Any, batch: FakeBatch) -> None:
    made = ai.chat.completions.create(model="coarse", messages=USER, n=3, seed=7, max_tokens=2)
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    assert [ask.sampling.seed for ask in batch.asks] == [7, 8, 9]
    assert made.usage.completion_tokens == 6
    assert made.usage.prompt_tokens == len(batch.asks[0].prompt)


def test_a_stream_of_several_answers(ai: Any) -> None:
    texts = ["", "", ""]
    ended = []
    for chunk in ai.chat.completions.create(model="coarse", messages=USER, n=3, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        ended += [choice.index] if choice.finish_reason else []
    assert texts == [WORDS] * 3 and sorted(ended) == [0, 1, 2]


def test_stop_strings(ai: Any) -> None:
    made = ai.chat.completions.create(model="coarse", messages=USER, stop=[" four"])
    assert made.choices[0].message.content == " one two three"
    assert made.choices[0].finish_reason == "stop"
    assert made.choices[0].stop_reason == " four"


def test_sampling_reaches_the_engine(ai: Any, batch: FakeBatch) -> None:
    ai.chat.completions.create(
        model="coarse", messages=USER, temperature=0.5, top_p=0.9, presence_penalty=1,
        frequency_penalty=-1, logit_bias={"5": -100},
        extra_body={"top_k": 3, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2,
                    "ignore_eos": True, "stop_token_ids": [9], "max_tokens": 3,
                    "include_stop_str_in_output": True, "skip_special_tokens": False},
    )  # fmt: skip
    ask = batch.asks[0]
    s = ask.sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p) == (0.5, 0.9, 3, 0.1)
    assert (s.presence_penalty, s.frequency_penalty, s.repetition_penalty) == (1, -1, 1.1)
    assert dict(s.logit_bias) == {5: -100.0} and s.seed is None
    assert ask.ignore_eos and ask.include_stop and not ask.skip_special_tokens
    assert (ask.min_tokens, ask.stop_token_ids) == (2, (9,))


def test_logprobs(ai: Any) -> None:
    made = ai.chat.completions.create(
        model="coarse", messages=USER, max_tokens=2, logprobs=True, top_logprobs=3
    )
    first = made.choices[0].logprobs.content[0]
    assert (first.token, bytes(first.bytes)) == (" one", b" one")
    assert len(first.top_logprobs) == 3 and first.top_logprobs[0].logprob == first.logprob
    streamed = ai.chat.completions.create(
        model="coarse", messages=USER, max_tokens=2, logprobs=True, stream=True
    )
    told = [c.choices[0].logprobs.content for c in streamed if c.choices[0].logprobs]
    assert [entry.token for entries in told for entry in entries] == [" one", " two"]


SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
}


def test_a_json_schema(ai: Any, batch: FakeBatch) -> None:
    batch.says = lambda ask: '{"n": 3}'
    made = ai.chat.completions.create(
        model="coarse",
        messages=USER,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
    )
    assert json.loads(made.choices[0].message.content) == {"n": 3}
    assert batch.asks[0].grammar is not None
    batch.asks.clear()
    ai.chat.completions.create(
        model="coarse", messages=USER, response_format={"type": "json_object"}
    )
    assert batch.asks[0].grammar is not None


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = '{"name": "get_weather", "arguments": {"city": "Oslo"}}'


@pytest.fixture
def calling(batch: FakeBatch) -> FakeBatch:
    batch.says = lambda ask: f"Let me see.<tool_call>\n{CALL}\n</tool_call>"
    return batch


def test_a_tool_is_called(ai: Any, calling: FakeBatch) -> None:
    made = ai.chat.completions.create(model="coarse", messages=USER, tools=[TOOL])
    (call,) = made.choices[0].message.tool_calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    assert made.choices[0].finish_reason == "tool_calls"
    assert made.choices[0].message.content.strip() == "Let me see."


def test_a_tool_is_called_in_a_stream(ai: Any, calling: FakeBatch) -> None:
    chunks = ai.chat.completions.create(model="coarse", messages=USER, tools=[TOOL], stream=True)
    name, arguments, ids, finishes = "", "", [], []
    for chunk in chunks:
        (choice,) = chunk.choices
        for call in choice.delta.tool_calls or ():
            assert call.index == 0
            name += call.function.name or ""
            arguments += call.function.arguments or ""
            ids += [call.id] if call.id else []
        finishes += [choice.finish_reason] if choice.finish_reason else []
    assert (name, json.loads(arguments)) == ("get_weather", {"city": "Oslo"})
    assert len(ids) == 1 and finishes == ["tool_calls"]


def test_a_delta_has_one_piece_of_each_call(ai: Any, batch: FakeBatch) -> None:
    """As OpenAI sends them, also where name and arguments come with the same token."""
    batch.says = lambda ask: '<tool_call>\n{"name": "get_weather", "arguments": {}}\n</tool_call>'
    chunks = ai.chat.completions.create(model="coarse", messages=USER, tools=[TOOL], stream=True)
    called = [calls for chunk in chunks if (calls := chunk.choices[0].delta.tool_calls)]
    for calls in called:
        assert len({call.index for call in calls}) == len(calls)
    assert "".join(call.function.arguments for calls in called for call in calls) == "{}"


def test_the_conversation_goes_on_after_a_call(ai: Any, calling: FakeBatch) -> None:
    made = ai.chat.completions.create(model="coarse", messages=USER, tools=[TOOL])
    message = made.choices[0].message
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    again = [*USER, message.model_dump(), result]
    assert ai.chat.completions.create(model="coarse", messages=again, tools=[TOOL]).choices


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_a_call_can_be_demanded(ai: Any, calling: FakeBatch, choice: Any) -> None:
    ai.chat.completions.create(model="coarse", messages=USER, tools=[TOOL], tool_choice=choice)
    assert calling.asks[0].grammar is not None


def test_no_tools_no_calls(ai: Any, calling: FakeBatch) -> None:
    made = ai.chat.completions.create(
        model="coarse", messages=USER, tools=[TOOL], tool_choice="none"
    )
    assert "<tool_call>" in made.choices[0].message.content
    assert made.choices[0].message.tool_calls is None


def test_errors_are_the_clients_own_exceptions(ai: Any, batch: FakeBatch) -> None:
    with pytest.raises(openai.NotFoundError, match="no model"):
        ai.chat.completions.create(model="gpt-5", messages=USER)
    with pytest.raises(openai.BadRequestError, match="temperature") as told:
        ai.chat.completions.create(model="coarse", messages=USER, temperature=9)
    assert told.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="context of 512") as told:
        ai.chat.completions.create(model="coarse", messages=USER, max_tokens=5000)
    assert told.value.code == "context_length_exceeded"
    batch.full = True
    with pytest.raises(openai.RateLimitError) as told:
        ai.chat.completions.create(model="coarse", messages=USER)
    assert told.value.response.headers["retry-after"] == "2"


def test_a_failure_in_the_middle_of_a_stream_is_raised(ai: Any, batch: FakeBatch) -> None:
    batch.pace = 0.05
    stream = iter(ai.chat.completions.create(model="coarse", messages=USER, stream=True))
    next(stream)
    batch.die()
    with pytest.raises(openai.APIError, match="the engine has stopped"):
        list(stream)


def test_the_key_is_asked_for(batch: FakeBatch) -> None:
    with running(batch, api_key="s3cret") as server:
        knows = openai.OpenAI(base_url=server.url + "/v1", api_key="s3cret", max_retries=0)
        assert knows.models.list().data[0].id == "coarse"
        guesses = openai.OpenAI(base_url=server.url + "/v1", api_key="guess", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            guesses.models.list()


def test_models(ai: Any) -> None:
    assert [model.id for model in ai.models.list()] == ["coarse", "alias"]
    assert ai.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError):
        ai.models.retrieve("another/one")


def test_completions(ai: Any) -> None:
    made = ai.completions.create(model="coarse", prompt="Hi", max_tokens=2, echo=True, logprobs=2)
    choice = made.choices[0]
    assert choice.text == "Hi one two"
    assert choice.logprobs.tokens[-2:] == [" one", " two"]
    assert choice.logprobs.text_offset[-2:] == [2, 6]
    pieces = ai.completions.create(model="coarse", prompt="Hi", max_tokens=2, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == " one two"
