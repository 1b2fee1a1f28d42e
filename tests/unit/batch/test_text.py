"""Text as it streams, against decoding everything at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import KINDS, tokenizer_of

from understudy.batch import Ask, Delta, TokenLogprob
from understudy.batch.text import (
    CONTEXT,
    LONGEST,
    Answer,
    Detokenizer,
    StopStrings,
    token_bytes,
    token_offsets,
)
from understudy.core import UnderstudyError

HALF = "\ufffd"
TRIES = settings(max_examples=60, deadline=None, derandomize=True)

# Texts with characters of one to four bytes, tokens in any order, and bytes that are no character.
TEXTS = st.text(st.sampled_from("ab \n,.é漢字😀👩‍🚀\u0301"), max_size=6)
RUNS = st.lists(st.one_of(TEXTS, st.integers(min_value=0, max_value=4200)), max_size=8)


def tokens_of(kind: str, runs: Sequence[str | int]) -> list[int]:
    """Some ids lie beyond the tokenizer's vocabulary, as in models that are padded."""
    tokenizer, tokens = tokenizer_of(kind), []
    for run in runs:
        if isinstance(run, str):
            tokens += tokenizer.encode(run, add_special_tokens=False)
        else:
            tokens.append(run % (len(tokenizer) + 3))
    return tokens


def decoded_at_once(kind: str, before: Sequence[int], tokens: Sequence[int], skip: bool) -> str:
    def decode(ids: Sequence[int]) -> str:
        return str(
            tokenizer_of(kind).decode(
                list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False
            )
        )

    start = decode(before)
    return decode(tokens) if start.endswith(HALF) else decode([*before, *tokens])[len(start) :]


def streamed(kind: str, before: Sequence[int], tokens: Sequence[int], skip: bool) -> list[str]:
    detokenizer = Detokenizer(tokenizer_of(kind), before, skip)
    return [*(detokenizer.add(token) for token in tokens), detokenizer.flush()]


# --------------------------------------------------------------------------------- detokenisation


@pytest.mark.parametrize("kind", KINDS)
@given(before=RUNS, runs=RUNS, skip=st.booleans())
@TRIES
def test_streamed_text_is_the_decoded_text(
    kind: str, before: list[str | int], runs: list[str | int], skip: bool
) -> None:
    first, tokens = tokens_of(kind, before), tokens_of(kind, runs)
    expected = decoded_at_once(kind, first, tokens, skip)
    if kind == "byte_fallback" and HALF in decoded_at_once(kind, [], [*first, *tokens], skip):
        return  # beside broken bytes this decoder takes back whole characters: the test below
    assert "".join(streamed(kind, first, tokens, skip)) == expected


@pytest.mark.parametrize("kind", ["fine", "byte_level", "byte_fallback"])
@given(text=TEXTS, more=TEXTS)
@TRIES
def test_no_half_character_is_sent(kind: str, text: str, more: str) -> None:
    pieces = streamed(kind, [], tokens_of(kind, [text, more]), True)
    assert not any(HALF in piece for piece in pieces)
    assert pieces[-1] == ""  # nothing was kept longer than necessary


def test_whole_characters_beside_broken_bytes_are_sent_once() -> None:
    tokenizer = tokenizer_of("byte_fallback")
    good, bad = tokens_of("byte_fallback", ["漢"])[1:], tokenizer.convert_tokens_to_ids("<0xFF>")
    (a,) = tokenizer.convert_tokens_to_ids(["a"])
    before = tokens_of("byte_fallback", ["b"])
    text = "".join(streamed("byte_fallback", before, [*good, bad, a, *good, a], True))
    assert text == f"漢{HALF}a漢a"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_endless_broken_bytes_cost_no_more_per_token(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizer_of(kind)
    lengths: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def decode(self, tokens: list[int], **how: Any) -> str:
            lengths.append(len(tokens))
            return str(tokenizer.decode(tokens, **how))

    piece = "<0x80>" if kind == "byte_fallback" else "ł"
    detokenizer = Detokenizer(Counting(), [])
    broken = [tokenizer.convert_tokens_to_ids(piece)] * 100
    pieces = [detokenizer.add(token) for token in broken]
    assert "".join(pieces) + detokenizer.flush() == HALF * 100
    assert len("".join(pieces)) >= 96
    assert max(lengths) <= CONTEXT + LONGEST


@pytest.mark.parametrize("kind", KINDS)
@given(before=RUNS, runs=RUNS)
@TRIES
def test_offsets_say_where_a_token_begins(
    kind: str, before: list[str | int], runs: list[str | int]
) -> None:
    first, tokens = tokens_of(kind, before), tokens_of(kind, runs)
    pieces = streamed(kind, first, tokens, True)
    expected = [len("".join(pieces[:i])) for i in range(len(tokens))]
    assert token_offsets(tokenizer_of(kind), tokens, first) == expected


@pytest.mark.parametrize("kind", ["fine", "byte_level", "unigram", "byte_fallback"])
def test_bytes_of_tokens_spell_the_text(kind: str) -> None:
    text = "the dog sleeps, x" if kind == "unigram" else "the dog, 漢字 über 😀."
    spelled = b"".join(token_bytes(tokenizer_of(kind), t) for t in tokens_of(kind, [text]))
    assert spelled.decode().removeprefix(" ") == text


def test_bytes_of_a_special_token_are_its_name() -> None:
    tokenizer = tokenizer_of("fine")
    assert token_bytes(tokenizer, 0) == b"<|end|>"
    assert token_bytes(tokenizer, len(tokenizer) + 1) == b""


# ----------------------------------------------------------------------------------- stop strings


def stopped_letter_by_letter(
    text: str, stops: Sequence[str], include: bool, immune: int
) -> tuple[str, str | None]:
    """The obvious version: letters come one at a time, the first that completes a stop ends."""
    for end in range(immune + 1, len(text) + 1):
        done = [stop for stop in stops if text[:end].endswith(stop)]
        if done:
            stop = max(done, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=3)
PIECES = st.lists(st.text("abc", max_size=3), max_size=8)


@given(pieces=PIECES, stops=STOPS, include=st.booleans(), immune=st.integers(0, 4))
@settings(TRIES, max_examples=300)
def test_stop_strings_do_not_depend_on_the_pieces(
    pieces: list[str], stops: list[str], include: bool, immune: int
) -> None:
    watch, sent, found = StopStrings(stops, include), "", None
    for i, piece in enumerate(pieces):
        settled, found = watch.feed(piece, may_stop=i >= immune)
        sent += settled
        so_far = "".join(pieces[: i + 1])
        if found is not None:
            break
        # What is kept back may still become a stop string, and nothing else is kept back.
        kept = so_far[len(sent) :]
        assert sent + kept == so_far
        begun = [n for s in stops for n in range(1, len(s)) if so_far.endswith(s[:n])]
        assert len(kept) <= max(begun, default=0)
    else:
        sent += watch.finish()
    expected = stopped_letter_by_letter(
        "".join(pieces), stops, include, len("".join(pieces[:immune]))
    )
    assert (sent, found) == expected


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(UnderstudyError, match="stop"):
        StopStrings(["a", ""])


# ----------------------------------------------------------------------------------------- answers


def answered(kind: str, tokens: Sequence[int], eos: int = 1, **ask: Any) -> list[Delta]:
    ask = {"prompt": (), "max_new_tokens": 100} | ask
    answer, deltas = Answer(tokenizer_of(kind), Ask(**ask), {eos}), []
    for token in tokens:
        deltas.append(answer.add(TokenLogprob(token, -1.0)))
        if deltas[-1].last:
            break
    return deltas


def text_of(deltas: Sequence[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


@pytest.mark.parametrize("kind", ["fine", "unigram"])
@given(runs=RUNS, stops=st.lists(st.text("ab é,", min_size=1, max_size=3), max_size=2))
@TRIES
def test_an_answer_is_its_decoded_text_up_to_the_stop(
    kind: str, runs: list[str | int], stops: list[str]
) -> None:
    tokens = tokens_of(kind, runs)
    deltas = answered(kind, tokens, eos=-1, stop=tuple(stops), max_new_tokens=max(1, len(tokens)))
    whole = decoded_at_once(kind, [], tokens, True)
    expected, stop = stopped_letter_by_letter(whole, stops, False, 0)
    assert text_of(deltas) == expected
    assert [t for delta in deltas for t in delta.tokens] == tokens[: len(deltas)]
    if tokens:
        assert (deltas[-1].finish, deltas[-1].stop_reason) == ("stop" if stop else "length", stop)


def test_the_models_end_leaves_no_text() -> None:
    tokens = [*tokens_of("fine", ["one two"]), 0]
    deltas = answered("fine", [*tokens, 5], eos=0, skip_special_tokens=False)
    assert text_of(deltas) == "one two"
    assert (deltas[-1].finish, deltas[-1].stop_reason) == ("stop", None)
    assert deltas[-1].tokens == (0,)


def test_the_models_end_can_be_ignored_and_wanted_as_text() -> None:
    tokens = [*tokens_of("fine", ["one"]), 0, *tokens_of("fine", [" two"])]
    ignored = answered("fine", tokens, eos=0, ignore_eos=True, max_new_tokens=len(tokens))
    assert (text_of(ignored), ignored[-1].finish) == ("one two", "length")
    wanted = answered("fine", tokens, eos=0, include_stop=True, skip_special_tokens=False)
    assert text_of(wanted) == "one<|end|>"


def test_a_stop_token_says_which() -> None:
    tokens = tokens_of("fine", ["one two three"])
    deltas = answered("fine", tokens, stop_token_ids=(tokens[1],))
    assert text_of(deltas) == tokenizer_of("fine").decode(tokens[:1])
    assert (deltas[-1].finish, deltas[-1].stop_reason) == ("stop", tokens[1])
    both = answered("fine", tokens, eos=tokens[1], ignore_eos=True, stop_token_ids=(tokens[1],))
    assert both[-1].stop_reason == tokens[1]


def test_nothing_ends_an_answer_before_min_tokens() -> None:
    tokens = tokens_of("fine", ["a b a b a b"])
    assert len(tokens) == 6
    deltas = answered("fine", tokens, stop=(" b",), min_tokens=2)
    assert (text_of(deltas), len(deltas), deltas[-1].stop_reason) == ("a b a", 4, " b")
    deltas = answered("fine", tokens, eos=tokens[1], min_tokens=3)
    assert text_of(deltas) == "a b a"


def test_what_was_kept_back_for_a_stop_string_comes_with_the_end() -> None:
    tokens = tokens_of("fine", ["so it is"])
    deltas = answered("fine", tokens, stop=(" is it",), max_new_tokens=len(tokens))
    assert (text_of(deltas), deltas[-1].finish) == ("so it is", "length")
    assert [delta.text for delta in deltas][-1].endswith(" is")


def test_a_complete_grammar_ends_the_answer() -> None:
    answer = Answer(tokenizer_of("fine"), Ask(prompt=(1,), max_new_tokens=9), {0})
    delta = answer.add(TokenLogprob(tokens_of("fine", ["a"])[0], -1.0), complete=True)
    assert (delta.text, delta.finish, delta.stop_reason) == ("a", "stop", None)


def test_logprobs_come_with_their_token_and_only_when_asked() -> None:
    tokens = tokens_of("fine", ["漢 is it"])
    with_them = answered("fine", tokens, logprobs=0, stop=("is it all",))
    assert [delta.logprobs[0].token for delta in with_them] == tokens
    assert not any(delta.logprobs for delta in answered("fine", tokens))


def test_a_prompt_keeps_the_space_of_the_first_word() -> None:
    tokens = tokens_of("unigram", ["the dog"])
    alone = answered("unigram", tokens, max_new_tokens=len(tokens))
    after = answered("unigram", tokens, max_new_tokens=len(tokens), prompt=tuple(tokens))
    assert (text_of(alone), text_of(after)) == ("the dog", " the dog")
