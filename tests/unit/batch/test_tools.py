"""Tool calls: told to the model, held to their form, and heard, in every form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import tokenizer_of
from transformers import AddedToken, AutoTokenizer

from understudy.batch import Grammar
from understudy.batch.grammar import GrammarError, Grammars
from understudy.batch.toolforms import FORMS
from understudy.batch.tools import Content, Named, ToolCallDelta, ToolFormat, ToolParser
from understudy.core import UnderstudyError

SIZE, END = 4200, 0
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 6},
                "unit": {"enum": ["C", "F"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
PING = {"type": "function", "function": {"name": "ping"}}
TOOLS = [WEATHER, PING]
NAMES = ["get_weather", "ping"]

Calls = list[tuple[str, str]]


def in_form(name: str) -> ToolFormat:
    form = FORMS[name]
    return ToolFormat(form, native=False, knows_system=True, skip_special_tokens=True)


def heard(form: str, pieces: Sequence[str]) -> tuple[str, Calls]:
    """What an answer says, and the calls it makes."""
    parser, content, calls, ids = ToolParser(FORMS[form], NAMES), "", [], []
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    for event in events:
        if isinstance(event, Content):
            assert event.text
            content += event.text
        elif event.name is not None:
            assert event.index == len(calls) and event.id
            calls.append((event.name, event.arguments))
            ids.append(event.id)
        else:
            assert event.index == len(calls) - 1 and event.id is None
            calls[-1] = (calls[-1][0], calls[-1][1] + event.arguments)
    assert parser.calls == len(calls) == len(set(ids))
    return content, calls


# ---------------------------------------------------------------------------------------- hearing

ARGUMENTS = '{"city": "a}\\"]b</tool_call>", "deep": [{}, {"x": [1]}]}'
CASES: list[tuple[str, str, str, Calls]] = [
    ("hermes", "Just text, 1 < 2.", "Just text, 1 < 2.", []),
    (
        "hermes",
        f'<tool_call>\n{{"name": "ping", "arguments": {ARGUMENTS}}}\n</tool_call>',
        "",
        [("ping", ARGUMENTS)],
    ),
    (
        "hermes",
        'Let me see.\n\n<tool_call>{"name":"ping","arguments":{}}</tool_call>\n'
        '<tool_call>\n{"name": "get_weather", "arguments": {"a": 1}}\n</tool_call>\n',
        "Let me see.",
        [("ping", "{}"), ("get_weather", '{"a": 1}')],
    ),
    (
        "hermes",
        '<tool_call>{"arguments": {"a": 1}, "name": "ping"}</tool_call> done',
        " done",
        [("ping", '{"a": 1}')],
    ),
    (
        "hermes",
        '<tool_call>{"name": "ping", "arguments": "{}"}</tool_call>',
        "",
        [("ping", "{}")],
    ),
    (
        "hermes",
        'x <tool_call>{"name": "other", "arguments": {}}</tool_call> y',
        'x<tool_call>{"name": "other", "arguments": {}}</tool_call> y',
        [],
    ),
    ("hermes", "<tool_call>no JSON</tool_call>", "<tool_call>no JSON</tool_call>", []),
    ("hermes", 'cut <tool_call>{"name": "pi', 'cut<tool_call>{"name": "pi', []),
    (
        "hermes",
        '<tool_call>{"name": "ping", "arguments": {"a": [1',
        "",
        [("ping", '{"a": [1')],
    ),
    (
        "hermes",
        '<tool_call>{"name": "ping", "arguments": {}, "id": {"a": 1}}</tool_call>x',
        "x",
        [("ping", "{}")],
    ),
    ("hermes", "a <tool", "a <tool", []),
    ("json", '{"name": "ping", "parameters": {}}', "", [("ping", "{}")]),
    (
        "json",
        f' <|python_tag|>{{"name": "ping", "parameters": {ARGUMENTS}}};'
        '{"name":"get_weather","parameters":{"a":1}}\n',
        "",
        [("ping", ARGUMENTS), ("get_weather", '{"a":1}')],
    ),
    ("json", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    ("json", '{"name": "ping", "age": 3}', '{"name": "ping", "age": 3}', []),
    ("json", "It is {", "It is {", []),
    ("json", '{"name": "ping", "parameters": {}} ok', " ok", [("ping", "{}")]),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "ping", "arguments": {}}, '
        f'{{"name": "get_weather", "arguments": {ARGUMENTS}}}]',
        "",
        [("ping", "{}"), ("get_weather", ARGUMENTS)],
    ),
    (
        "mistral",
        'So: [TOOL_CALLS][{"arguments": {"a": 1}, "name": "ping"}]',
        "So:",
        [("ping", '{"a": 1}')],
    ),
    ("mistral", "[1, 2] is a list [TOOL", "[1, 2] is a list [TOOL", []),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), CASES)
def test_an_answer_is_heard(form: str, text: str, content: str, calls: Calls) -> None:
    assert heard(form, [text]) == (content, calls)
    assert heard(form, list(text)) == (content, calls)


@given(case=st.sampled_from(CASES), cuts=st.lists(st.integers(0, 200), max_size=6))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_pieces_do_not_matter(case: tuple[str, str, str, Calls], cuts: list[int]) -> None:
    form, text, content, calls = case
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(places)]
    assert heard(form, pieces) == (content, calls)


SCRAPS = [
    *("<tool_call>", "</tool_call>", "<tool", "[TOOL_CALLS]", "<|python_tag|>"),
    *('{"name": "ping", ', '"arguments": ', '"parameters": ', '{"a": "}"}', '{"name":"Bob"'),
    *("[", "]", "{", "}", ",", ";", " ", "\n", "x", '"', "\\", '"name": "ping"'),
]


@pytest.mark.parametrize("form", FORMS)
@given(scraps=st.lists(st.sampled_from(SCRAPS), max_size=12))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_whatever_is_written_the_pieces_do_not_matter(form: str, scraps: list[str]) -> None:
    text = "".join(scraps)
    assert heard(form, [text]) == heard(form, scraps) == heard(form, list(text))


def test_arguments_go_out_as_they_are_written() -> None:
    parser = ToolParser(FORMS["hermes"], NAMES)
    assert parser.feed('<tool_call>{"name": "ping", "arguments": ') == []
    begun, first = parser.feed('{"a"')
    assert isinstance(begun, ToolCallDelta) and begun.id
    assert begun == ToolCallDelta(0, id=begun.id, name="ping")
    assert first == ToolCallDelta(0, '{"a"')
    assert parser.feed(": 1}}\n</tool") == [ToolCallDelta(0, ": 1}")]
    assert parser.feed("_call>") == []


def test_ids_are_such_as_templates_want() -> None:
    call = '[TOOL_CALLS][{"name": "ping", "arguments": {}}]'
    begun = ToolParser(FORMS["mistral"], NAMES).feed(call)[0]
    assert isinstance(begun, ToolCallDelta) and begun.id is not None
    assert len(begun.id) == 9 and begun.id.isalnum()


# ---------------------------------------------------------------------------------------- holding


def with_markers() -> Any:
    """The tokenizer with the tokens that models taught to call have."""
    tokenizer = AutoTokenizer.from_pretrained(
        tokenizer_of("fine").name_or_path, local_files_only=True
    )
    markers = ["<tool_call>", "</tool_call>", "<think>"]
    tokenizer.add_tokens([AddedToken(m, special=False, normalized=False) for m in markers])
    tokenizer.add_tokens([AddedToken("[TOOL_CALLS]", special=True, normalized=False)])
    return tokenizer


@pytest.fixture(scope="module", params=["plain", "with_markers"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return tokenizer_of("fine") if request.param == "plain" else with_markers()


@pytest.fixture(scope="module")
def grammars(tokenizer: Any) -> Grammars:
    return Grammars(tokenizer, SIZE, {END})


def walk(tokenizer: Any, grammar: Grammar, seed: int, begun: str = "", most: int = 600) -> str:
    """An answer that begins with ``begun``, by a model that has learned nothing but to stop."""
    dice = torch.Generator().manual_seed(seed)
    matcher, tokens = grammar.begin(), []
    for token in tokenizer.encode(begun):
        scores = torch.zeros(SIZE)
        matcher.constrain(scores)
        assert scores[token] == 0
        tokens.append(token)
        matcher.accept(token)
    while not matcher.complete and len(tokens) < most:
        scores = torch.rand(SIZE, generator=dice)
        scores[END] = 2.0
        matcher.constrain(scores)
        tokens.append(int(scores.argmax()))
        if tokens[-1] == END:
            break
        matcher.accept(tokens[-1])
    assert matcher.complete or tokens[-1] == END
    return str(tokenizer.decode([t for t in tokens if t != END]))


def require_sound(calls: Calls) -> None:
    for name, arguments in calls:
        found = json.loads(arguments)
        if name == "ping":
            assert found == {}
        else:
            assert list(found) == ["city", "unit"] and found["unit"] in ("C", "F")


@pytest.mark.parametrize("form", FORMS)
def test_required_calls_are_made(tokenizer: Any, grammars: Grammars, form: str) -> None:
    seen = set()
    for seed in range(20):
        grammar = in_form(form).grammar(grammars, TOOLS, "required")
        assert grammar is not None
        content, calls = heard(form, [walk(tokenizer, grammar, seed)])
        assert content == "" and calls
        require_sound(calls)
        seen |= {name for name, _ in calls}
    assert seen == set(NAMES)


@pytest.mark.parametrize("form", FORMS)
def test_a_named_tool_is_called_once(tokenizer: Any, grammars: Grammars, form: str) -> None:
    grammar = in_form(form).grammar(grammars, TOOLS, Named("get_weather"))
    assert grammar is not None
    content, calls = heard(form, [walk(tokenizer, grammar, 1)])
    assert content == "" and [name for name, _ in calls] == ["get_weather"]
    require_sound(calls)


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize(
    ("form", "begun"),
    [
        ("hermes", "Let me look. <tool_call>"),
        ("json", '{"name": "get_weather"'),
        ("json", '<|python_tag|>{"name":"ping"'),
        ("mistral", "[TOOL_CALLS]"),
    ],
)
def test_a_call_that_was_begun_is_finished(
    tokenizer: Any, grammars: Grammars, form: str, begun: str, parallel: bool
) -> None:
    for seed in range(3):
        grammar = in_form(form).grammar(grammars, TOOLS, "auto", parallel)
        assert grammar is not None
        _, calls = heard(form, [walk(tokenizer, grammar, seed, begun)])
        assert calls if parallel else len(calls) == 1
        require_sound(calls)


@pytest.mark.parametrize("form", FORMS)
def test_text_is_free_while_no_call_is_made(grammars: Grammars, form: str) -> None:
    grammar = in_form(form).grammar(grammars, TOOLS, "auto")
    assert grammar is not None
    matcher = grammar.begin()
    for token in range(200, 260):
        scores = torch.zeros(SIZE)
        matcher.constrain(scores)
        assert not scores.any() and not matcher.complete
        matcher.accept(token)


def test_what_was_trained_as_one_token_must_be_that_token(
    grammars: Grammars, tokenizer: Any
) -> None:
    grammar = in_form("hermes").grammar(grammars, TOOLS, "required")
    assert grammar is not None
    scores = torch.zeros(SIZE)
    grammar.begin().constrain(scores)
    marker = tokenizer.convert_tokens_to_ids("<tool_call>")
    allowed = scores.isfinite().nonzero()[:, 0].tolist()
    assert allowed == [marker] if marker else tokenizer.decode(allowed[0])[0] == "<"


def test_choices_that_cannot_be(grammars: Grammars) -> None:
    hermes = in_form("hermes")
    assert hermes.grammar(grammars, TOOLS, "none") is None
    with pytest.raises(GrammarError, match="'other'"):
        hermes.grammar(grammars, TOOLS, Named("other"))
    odd = {"name": "odd", "parameters": {"type": "array", "uniqueItems": True}}
    lenient = {"type": "function", "function": odd}
    strict = {"type": "function", "function": odd | {"strict": True}}
    assert hermes.grammar(grammars, [lenient], "required") is not None
    with pytest.raises(GrammarError, match="uniqueItems"):
        hermes.grammar(grammars, [strict], "auto")


# ---------------------------------------------------------------------------------------- telling

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }} {{ c.function.arguments.city }}]"
    "{% endfor %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SHOWS = "{% if tools %}{{ tools | tojson }} write: {% raw %}FORM{% endraw %}\n{% endif %}"
QUESTION = {"role": "user", "content": "How warm is it?"}
HISTORY = [
    QUESTION,
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Rome", "unit": "C"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "21"},
    {"role": "tool", "tool_call_id": "call_2", "content": "22"},
]


def told(template: str, messages: Any, tools: Any = (), name: str = "auto") -> str:
    tokenizer = tokenizer_of("fine")
    format = ToolFormat.of(name, tokenizer, template)
    return str(tokenizer.decode(format.render(tokenizer, messages, tools, chat_template=template)))


@pytest.mark.parametrize(
    ("shows", "form", "native"),
    [
        ("", "hermes", False),
        ('<tool_call>{"name": .., "arguments": ..}</tool_call>', "hermes", True),
        ('<tool_call>{\\"name\\": .., \\"arguments\\": ..}</tool_call>', "hermes", True),
        ("<tool_call><function=name><parameter=x>", "hermes", False),
        ("[TOOL_CALLS] [..]", "mistral", True),
        ("[TOOL_CALLS]name[ARGS]{}", "hermes", False),
        ('{"name": function name, "parameters": dictionary}', "json", True),
        ("call them", "hermes", False),
    ],
)
def test_the_form_is_seen_in_the_template(shows: str, form: str, native: bool) -> None:
    template = (SHOWS.replace("FORM", shows) if shows else "") + CHATML
    format = ToolFormat.of("auto", tokenizer_of("fine"), template)
    assert (format.form.name, format.native) == (form, native)
    text = told(template, [QUESTION], TOOLS)
    assert text.count("get_weather") == 1 and text.endswith("<user>How warm is it?\n<assistant>")
    assert ("<tools>" in text) is not native


def test_a_form_can_be_named() -> None:
    template = SHOWS.replace("FORM", "call them") + CHATML
    format = ToolFormat.of("mistral", tokenizer_of("fine"), template)
    assert (format.form.name, format.native) == ("mistral", True)
    with pytest.raises(UnderstudyError, match="auto, hermes, json, mistral"):
        ToolFormat.of("qwen", tokenizer_of("fine"))


def test_words_go_where_the_template_has_a_place() -> None:
    system = told(CHATML, [QUESTION], TOOLS)
    assert system.startswith("<system># Tools") and system.count("<system>") == 1
    joined = told(CHATML, [{"role": "system", "content": "Be brief."}, QUESTION], TOOLS)
    assert joined.startswith("<system>Be brief.\n\n# Tools")
    tokenizer = tokenizer_of("fine")  # its template knows no system
    format = ToolFormat.of("auto", tokenizer)
    text = tokenizer.decode(format.render(tokenizer, [QUESTION], TOOLS))
    assert text.startswith("Question: # Tools")
    assert text.endswith("</tool_call>\n\nHow warm is it?\nAnswer:")


def test_without_tools_a_conversation_is_what_the_template_makes_of_it() -> None:
    tokenizer = tokenizer_of("fine")
    ids = ToolFormat.of("auto", tokenizer).render(tokenizer, [QUESTION])
    assert ids == tokenizer.apply_chat_template(
        [QUESTION], add_generation_prompt=True, return_dict=False
    )


def test_calls_of_the_past_are_shown_by_the_template_or_in_words() -> None:
    form = '<tool_call>{"name": .., "arguments": ..}</tool_call>'
    shows = SHOWS.replace("FORM", form) + CHATML
    native = told(shows, HISTORY, TOOLS)
    assert "<assistant>[get_weather Rome]\n<tool>21\n<tool>22\n<assistant>" in native
    words = told(CHATML, HISTORY)
    call = '{"name": "get_weather", "arguments": {"city": "Rome", "unit": "C"}}'
    assert f"<assistant><tool_call>\n{call}\n</tool_call>\n" in words
    assert "<user><tool_response>\n21\n</tool_response>\n<tool_response>\n22\n" in words
    assert HISTORY[1]["content"] is None  # the client's messages are left alone


@pytest.mark.parametrize("form", FORMS)
def test_what_is_written_of_the_past_would_be_heard(form: str) -> None:
    past = [{"name": "ping", "arguments": {}}, {"name": "get_weather", "arguments": {"city": "é"}}]
    _, calls = heard(form, [FORMS[form].written(past)])
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [
        (call["name"], call["arguments"]) for call in past
    ]


def test_markers_that_are_special_tokens_must_stay_in_the_text() -> None:
    tokenizer = with_markers()
    assert ToolFormat.of("hermes", tokenizer).skip_special_tokens
    assert not ToolFormat.of("mistral", tokenizer).skip_special_tokens
    assert ToolFormat.of("json", tokenizer).skip_special_tokens
