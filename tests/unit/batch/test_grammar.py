"""Grammars by random walks: whatever a model prefers, the answer has its form."""

from __future__ import annotations

import json
import re
import threading
from typing import Any

import pytest
import torch
from made_tokenizers import tokenizer_of

from understudy.batch import Grammar
from understudy.batch import grammar as module
from understudy.batch.grammar import GrammarError, Grammars

SIZE = 4200  # of the model's vocabulary; the tokenizer's has 4096
END = 0
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "friends": {"type": "array", "items": {"enum": ["Ada", "Bob"]}, "maxItems": 2},
        "tall": {"type": "boolean"},
    },
    "required": ["name", "age", "friends", "tall"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(tokenizer_of("fine"), SIZE, {END})


def walk(grammar: Grammar, seed: int = 0, most: int = 400) -> str:
    """An answer by a model that has learned nothing."""
    dice = torch.Generator().manual_seed(seed)
    matcher, tokens = grammar.begin(), []
    while not matcher.complete and len(tokens) < most:
        scores = torch.rand(SIZE, generator=dice)
        matcher.constrain(scores)
        tokens.append(int(scores.argmax()))
        matcher.accept(tokens[-1])
    assert matcher.complete, "it does not come to an end"
    return str(tokenizer_of("fine").decode(tokens, skip_special_tokens=True))


def follows(grammar: Grammar, text: str) -> bool:
    """Whether an answer may be ``text``, or begin with it."""
    matcher = grammar.begin()
    for token in tokenizer_of("fine").encode(text):
        scores = torch.zeros(SIZE)
        matcher.constrain(scores)
        if scores[token] != 0:
            return False
        matcher.accept(token)
    return True


def test_a_schema_is_kept_whatever_is_preferred(grammars: Grammars) -> None:
    for seed in range(15):
        person = json.loads(walk(grammars.json_schema(PERSON), seed))
        assert list(person) == ["name", "age", "friends", "tall"]
        assert len(person["name"]) <= 8 and 0 <= person["age"] <= 130
        assert len(person["friends"]) <= 2 and set(person["friends"]) <= {"Ada", "Bob"}
        assert isinstance(person["tall"], bool)


def test_json_is_an_object_without_room_for_white_space(grammars: Grammars) -> None:
    grammar = grammars.json_object()
    assert follows(grammar, '{"a": [1, {"b": null}], "c":"d"}')
    assert not follows(grammar, "[1]")
    assert not follows(grammar, '{"a":  1')
    assert not follows(grammar, '{\n"a"')


def test_other_forms(grammars: Grammars) -> None:
    assert {walk(grammars.choice(["red", 'a "b"\n']), seed) for seed in range(12)} == {
        "red",
        'a "b"\n',
    }
    assert re.fullmatch(r"[0-9]{2,3}x", walk(grammars.regex(r"[0-9]{2,3}x")))
    assert walk(grammars.lark('start: "a" b\nb: "c"')) == "ac"


def test_the_end_comes_when_the_form_allows_it(grammars: Grammars) -> None:
    matcher = grammars.regex("[0-9]{1,2}").begin()
    scores = torch.zeros(SIZE)
    matcher.constrain(scores)
    assert scores[END] == -torch.inf
    (one,) = tokenizer_of("fine").encode("1")
    matcher.accept(one)
    scores = torch.zeros(SIZE)
    matcher.constrain(scores)
    assert scores[END] == 0 and not matcher.complete
    matcher.accept(END)
    assert matcher.complete


def test_a_model_without_an_end_gets_none() -> None:
    grammar = Grammars(tokenizer_of("fine"), SIZE).regex("[0-9]{1,2}")
    matcher = grammar.begin()
    for token in tokenizer_of("fine").encode("12"):
        scores = torch.zeros(SIZE)
        matcher.constrain(scores)
        assert int(scores.isfinite().sum()) == 10
        matcher.accept(token)
    assert matcher.complete


def test_tokens_beyond_the_tokenizer_are_never_allowed(grammars: Grammars) -> None:
    scores = torch.zeros(SIZE)
    grammars.regex("(.|\n)*").begin().constrain(scores)
    assert not scores[4096:].isfinite().any()
    assert int(scores.isfinite().sum()) > 3000


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda g: g.json_schema({"not": {"type": "string"}}), '"not"'),
        (lambda g: g.json_schema({"type": "array", "uniqueItems": True}), '"uniqueItems"'),
        (lambda g: g.json_schema({"type": "sting"}), "sting"),
        (lambda g: g.json_schema({"$ref": "http://example.org/x"}), "example.org"),
        (lambda g: g.json_schema({"$ref": "#"}), "no text satisfies it"),
        (lambda g: g.json_schema(False), "false"),
        (lambda g: g.json_schema({"enum": [object()]}), "no JSON"),
        (lambda g: g.json_schema(nested(3000)), "recursion"),
        (lambda g: g.regex("("), "unclosed group"),
        (lambda g: g.lark("start: b"), "b"),
        (lambda g: g.choice([]), "choice"),
        (lambda g: g.choice(["a", ""]), "choice"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_said_in_one_line(grammars: Grammars, wrong: Any, says: str) -> None:
    with pytest.raises(GrammarError) as error:
        wrong(grammars)
    assert says in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def test_a_lenient_schema_leaves_out_what_cannot_be_enforced(grammars: Grammars) -> None:
    grammar = grammars.json_schema({"type": "array", "uniqueItems": True}, strict=False)
    assert follows(grammar, "[1, 1]")
    either = {"oneOf": [{"type": "string"}, {"type": "string", "maxLength": 3}]}
    assert follows(grammars.json_schema(either, strict=False), '"abcd"')
    assert follows(grammars.json_schema(True), '{"a": 1}')


def test_a_client_cannot_loosen_its_own_schema(grammars: Grammars) -> None:
    with pytest.raises(GrammarError, match="not"):
        grammars.json_schema({"not": {}, "x-guidance": {"lenient": True}})


def test_text_is_free_until_the_trigger(grammars: Grammars) -> None:
    body = 'start: "[" /[0-9]{1,3}/ "]"'
    grammar = grammars.after({"<<": body}, at_start=False, once=False)
    assert follows(grammar, "anything < at [all<<[12] and [x] again <<[3")
    assert not follows(grammar, "text <<(")
    assert not follows(grammar, "text <<[12] and <<x")
    matcher = grammar.begin()
    scores = torch.zeros(SIZE)
    matcher.constrain(scores)
    assert bool((scores == 0).all())  # also special tokens, and the end


def test_a_trigger_may_count_only_at_the_start_and_end_the_answer(grammars: Grammars) -> None:
    body = 'start: "(" /[0-9]{1,3}/ ")"'
    start = grammars.after({"f": body, "gg": body}, at_start=True, once=True)
    assert follows(start, " f(12)") and follows(start, "gg(1)") and follows(start, "g(x")
    assert not follows(start, "f(x") and follows(start, "a f(x")
    matcher = start.begin()
    for token in tokenizer_of("fine").encode("f(12)"):
        assert not matcher.complete
        matcher.accept(token)
    assert matcher.complete


def test_many_threads_compile_and_few_grammars_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 3)
    grammars = Grammars(tokenizer_of("fine"), SIZE, {END})
    answers: list[str] = []

    def work(number: int) -> None:
        for turn in range(10):
            answers.append(walk(grammars.choice([f"say {(number + turn) % 5}"])))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == sorted(f"say {(i + t) % 5}" for i in range(6) for t in range(10))
    assert len(grammars._compiled) == 3


def test_markers_are_special_tokens_where_there_are_some(grammars: Grammars) -> None:
    assert grammars.marker("<|end|>") == "<[0]>"
    assert grammars.marker('<"x">') == '"<\\"x\\">"'


def test_a_tokenizer_that_cannot_be_followed_is_an_error() -> None:
    with pytest.raises(GrammarError, match="tokenizer"):
        Grammars(object(), SIZE).json_object()
    with pytest.raises(GrammarError, match="tokenizer"):
        Grammars(tokenizer_of("wordpiece"), SIZE).json_object()
