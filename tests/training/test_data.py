"""The split holds out whole documents, and the tokenizer keeps what the problems rely on."""

import itertools
import lzma
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from training import data, tokenizer
from understudy import tasks

PROBLEMS = list(itertools.islice(tasks.problems(seed=2, held=False), 300))


@pytest.fixture(scope="module")
def coder() -> Tokenizer:
    return tokenizer.train(f"{tasks.ask(one.prompt)} {one.answer}" for one in PROBLEMS)


def test_split_holds_out_whole_documents() -> None:
    documents = [f"{number} " * (number % 7 + 1) for number in range(500)]
    training, held = data.split(documents)
    assert sorted(training + held) == sorted(documents)
    share = sum(map(len, held)) / sum(map(len, documents))
    assert data.HELD_OUT <= share < data.HELD_OUT + 0.01
    assert data.split(documents) == (training, held)


def test_titled_documents(tmp_path: Path) -> None:
    path = tmp_path / "texts.xz"
    with lzma.open(path, "wt") as file:
        file.write("= One =\n\na = b\n\n= Two =\n\nmore\n")
    assert data._titled(path) == ["= One =\n\na = b", "= Two =\n\nmore"]


def test_every_digit_is_a_piece_of_its_own(coder: Tokenizer) -> None:
    assert coder.encode("12345").tokens == list("12345")
    assert coder.token_to_id(tokenizer.END) == 0


def test_answer_mask_marks_answers_and_their_end(coder: Tokenizer) -> None:
    few = PROBLEMS[:20]
    tokens = data._encode(coder, [data._written(one) for one in few])
    mask = data._answer_mask(coder, tokens).astype(bool)
    ends = np.flatnonzero(tokens[mask] == 0) + 1
    answers = coder.decode_batch(np.split(tokens[mask], ends))
    assert [one.strip() for one in answers[:-1]] == [one.answer for one in few]
    assert not answers[-1]


def test_chat_template_asks_as_the_problems_do(coder: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(coder, tmp_path, context=64)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "sort c a b"}]
    asked = loaded.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert asked == tasks.ask("sort c a b")
    chat.append({"role": "assistant", "content": "a b c"})
    assert loaded.apply_chat_template(chat, tokenize=False) == asked + " a b c<|end|>"
    assert loaded.decode(loaded(asked).input_ids) == asked
