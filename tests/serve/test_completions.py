"""`/v1/completions` in all its forms, and what evaluators read out of it."""

from __future__ import annotations

from typing import Any

import pytest
from serve.conftest import Client
from serve.fake_batch import FakeBatch, logprob

from understudy.batch import Ask


def complete(client: Client, prompt: Any, **more: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", {"prompt": prompt, "max_tokens": 2, **more})
    assert response.status_code == 200, response.text
    return response.json()


def test_four_forms_of_a_prompt(client: Client, batch: FakeBatch, tokenizer: Any) -> None:
    one, two = tokenizer("Hello there").input_ids, tokenizer("You").input_ids
    for prompt in ("Hello there", ["Hello there", "You"], one, [one, two]):
        batch.asks.clear()
        made = complete(client, prompt)
        assert [ask.prompt for ask in batch.asks] in ([tuple(one)], [tuple(one), tuple(two)])
        assert [c["index"] for c in made["choices"]] == list(range(len(batch.asks)))


def test_sixteen_tokens_unless_told(client: Client, batch: FakeBatch) -> None:
    client.post("/v1/completions", {"prompt": "Hi"})
    assert batch.asks[0].max_new_tokens == 16


def test_answers_of_several_prompts_are_in_order(client: Client, batch: FakeBatch) -> None:
    made = complete(client, ["Hi", "Hello there"], n=2, echo=True, seed=3)
    texts = [choice["text"] for choice in made["choices"]]
    assert texts == ["Hi one two"] * 2 + ["Hello there one two"] * 2
    assert [ask.sampling.seed for ask in batch.asks] == [3, 4, 3, 4]
    assert made["usage"]["prompt_tokens"] == sum(len(ask.prompt) for ask in batch.asks[::2])


@pytest.mark.parametrize("new", [0, 1])
def test_the_logprobs_of_a_prompt(client: Client, tokenizer: Any, new: int) -> None:
    ids = tokenizer("Hello there").input_ids
    made = complete(client, ids, max_tokens=new, echo=True, logprobs=1, temperature=0)
    (choice,) = made["choices"]
    told = choice["logprobs"]
    assert len({len(part) for part in told.values()}) == 1 and len(told["tokens"]) == len(ids) + new
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    expected = [logprob(token, 1).logprob for token in ids[1:]]
    assert told["token_logprobs"][1 : len(ids)] == pytest.approx(expected)
    assert "".join(told["tokens"]) == choice["text"]
    assert [choice["text"][at:][:1] for at in told["text_offset"]] == [t[0] for t in told["tokens"]]


def test_what_lm_eval_sends_and_reads(client: Client, tokenizer: Any) -> None:
    api = pytest.importorskip("lm_eval.models.openai_completions").LocalCompletionsAPI
    prompts = [tokenizer("Hello there you").input_ids, tokenizer("Who is it?").input_ids]
    lengths = [2, 3]
    body = {
        "model": "coarse", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1,
        "seed": 1234, "echo": True,
    }  # fmt: skip
    response = client.post("/v1/completions", body)
    told = api.parse_logprobs(response.json(), tokens=prompts, ctxlens=lengths)
    for prompt, length, (total, greedy) in zip(prompts, lengths, told, strict=True):
        expected = sum(logprob(token, 1).logprob for token in prompt[length:])
        assert total == pytest.approx(expected) and greedy


def test_no_alternatives_but_the_token_itself(client: Client) -> None:
    told = complete(client, "Hi", logprobs=0)["choices"][0]["logprobs"]
    one, two = told["token_logprobs"]
    assert told["top_logprobs"] == [{" one": one}, {" two": two}]


def test_a_stream_carries_the_same_logprobs(client: Client) -> None:
    import json

    whole = complete(client, "Hello", logprobs=2, echo=True)["choices"][0]
    body = {"prompt": "Hello", "max_tokens": 2, "logprobs": 2, "echo": True, "stream": True}
    lines = client.post("/v1/completions", body).text.split("\n\n")
    pieces = [json.loads(line[6:])["choices"][0] for line in lines[:-2]]
    assert "".join(piece["text"] for piece in pieces) == whole["text"]
    for part, expected in whole["logprobs"].items():
        assert [v for piece in pieces for v in piece["logprobs"][part]] == expected, part


def test_bad_token_ids_are_refused(client: Client, batch: FakeBatch) -> None:
    for prompt in ([batch.vocab_size], [-1], [[0, 1 << 40]], [1.0], [True], [], [[]], "", [["a"]]):
        response = client.post("/v1/completions", {"prompt": prompt})
        assert response.status_code == 400, prompt
        assert response.json()["error"]["param"] == "prompt", prompt


def test_too_much_is_refused(client: Client, batch: FakeBatch) -> None:
    for body in (
        {"prompt": "Hi", "max_tokens": 600},
        {"prompt": [1] * 600, "max_tokens": 1},
        {"prompt": "a b " * 600},
        {"prompt": "a" * 100_000},
    ):
        error = client.post("/v1/completions", body).json()["error"]
        assert error["code"] == "context_length_exceeded"
    assert not batch.asks


def test_one_refusal_takes_the_others_with_it(client: Client, batch: FakeBatch) -> None:
    batch.most, batch.silent = 3, True
    batch.submit(Ask((1,), 1), lambda delta: None)
    response = client.post("/v1/completions", {"prompt": ["a", "b", "c"]})
    assert response.status_code == 429 and batch.cancelled == 2


def test_more_than_ever_fits_is_not_told_to_try_later(client: Client, batch: FakeBatch) -> None:
    batch.most = 2
    response = client.post("/v1/completions", {"prompt": ["a", "b", "c"]})
    assert response.status_code == 400 and not batch.asks
    assert "at most 2 at once" in response.json()["error"]["message"]


def test_tokenize_and_back(client: Client, tokenizer: Any) -> None:
    made = client.post("/tokenize", {"prompt": "Hello there", "return_token_strs": True}).json()
    assert made["tokens"] == tokenizer("Hello there").input_ids
    assert made["count"] == len(made["tokens"]) == len(made["token_strs"])
    assert made["max_model_len"] == 512
    back = client.post("/detokenize", {"tokens": made["tokens"]}).json()
    assert back == {"prompt": "Hello there"}
    chat = client.post("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]}).json()
    assert tokenizer.decode(chat["tokens"]) == "Question: Hi\nAnswer:"


def test_lm_eval_may_use_our_tokenizer(client: Client, tokenizer: Any) -> None:
    told = client.get("/tokenizer_info").json()
    assert told["eos_token"] == tokenizer.eos_token and told["chat_template"]
