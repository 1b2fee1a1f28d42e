"""A small model, which writes poor text, writes JSON and calls tools when it is held to."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from made_tokenizers import FINE, tokenizer_of
from transformers import AutoModelForCausalLM, DynamicCache

from understudy.batch import Ask, Delta, Grammar, Sampling
from understudy.batch.grammar import Grammars
from understudy.batch.sampling import Sampler
from understudy.batch.text import Answer
from understudy.batch.tools import Content, Named, ToolFormat

END = 0


@cache
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FINE, dtype=torch.float32)


@torch.inference_mode()
def written(
    prompt: list[int], grammar: Grammar | None, tokens: int, **sampling: Any
) -> list[Delta]:
    ask = Ask(tuple(prompt), tokens, Sampling(**sampling), grammar=grammar, stop=("\n\n",))
    sampler = Sampler(ask, model().config.vocab_size, {END})
    answer, cache = Answer(tokenizer_of("fine"), ask, {END}), DynamicCache()
    found: list[int] = []
    deltas: list[Delta] = []
    batch = torch.tensor([prompt])
    while not (deltas and deltas[-1].last):
        logits = model()(batch, past_key_values=cache).logits[0, -1]
        picked = sampler.pick(logits.float(), found)
        found.append(picked.token)
        deltas.append(answer.add(picked, sampler.complete))
        batch = torch.tensor([[picked.token]])
    return deltas


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(tokenizer_of("fine"), model().config.vocab_size, {END})


QUESTION = [{"role": "user", "content": "What is the weather in Rome?"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "maximum": 130, "minimum": 0},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": PERSON | {"properties": {"city": {"type": "string", "maxLength": 20}},
                                "required": ["city"]},
    },
}  # fmt: skip


def test_json(grammars: Grammars) -> None:
    prompt = ToolFormat.of("auto", tokenizer_of("fine")).render(tokenizer_of("fine"), QUESTION)
    for how in ({"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}):
        deltas = written(prompt, grammars.json_object(), 200, **how)
        assert deltas[-1].finish == "stop"
        assert isinstance(json.loads("".join(delta.text for delta in deltas)), dict)
        deltas = written(prompt, grammars.json_schema(PERSON), 100, **how)
        assert deltas[-1].finish == "stop"
        assert list(json.loads("".join(delta.text for delta in deltas))) == ["name", "age"]
    cut = written(prompt, grammars.json_schema(PERSON), 3, temperature=0.0)
    assert (len(cut), cut[-1].finish) == (3, "length")


def test_a_tool_call(grammars: Grammars) -> None:
    tokenizer = tokenizer_of("fine")
    format = ToolFormat.of("auto", tokenizer)
    prompt = format.render(tokenizer, QUESTION, [WEATHER])
    grammar = format.grammar(grammars, [WEATHER], Named("get_weather"))
    deltas = written(prompt, grammar, 150, temperature=0.0)
    assert deltas[-1].finish == "stop"
    parser = format.parser([WEATHER])
    events = [event for delta in deltas for event in parser.feed(delta.text)] + parser.finish()
    assert parser.calls == 1 and not any(isinstance(event, Content) for event in events)
    assert list(json.loads("".join(event.arguments for event in events))) == ["city"]
