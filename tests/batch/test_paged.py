"""Packed forwards over transformers' pages: every row gets what it would get alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from batch.drive import Driver, greedy_alone
from families import configs
from transformers import AutoModelForCausalLM, GptOssConfig

import understudy
from understudy.batch import Chunk, Row
from understudy.batch.paged import PAGE, Paged, Unpaged

PROMPTS = ([7, 9, 11, 20, 5, 6, 30, 31, 32, 33, 8], [3, 4, 5], [90, 80, 70, 60, 50, 40, 30])


def paged(model: Any, capacity: int = 1024) -> Paged:
    return Paged(model, capacity=capacity, max_rows=8, max_batch_tokens=64)


def test_rows_come_and_go_and_each_gets_its_own_answer(tiny: Callable[..., Path]) -> None:
    folder = tiny("qwen3_moe")
    plain = AutoModelForCausalLM.from_pretrained(folder)
    expected = [greedy_alone(plain, p, 12) for p in PROMPTS]
    with understudy.load(folder, slots=6) as model:
        seats = paged(model)
        driver = Driver(seats)
        first = driver.enter(PROMPTS[0])
        driver.step({first: 4})  # a prompt in two chunks, the second beside another's whole one
        second = driver.enter(PROMPTS[1])
        driver.step({first: 7, second: 3})
        driver.answer([first, second], 4)
        third = driver.enter(PROMPTS[2])
        driver.answer([first, third, second], 7)
        seats.release(second)
        driver.answer([third], 5)
        seats.release(first)
        seats.release(third)
        assert seats.used == 0
        model.understudy.runtime.director.book.check_integrity(idle=True)
    answers = [row.tokens[len(p) :][:12] for row, p in zip(driver.rows, PROMPTS, strict=True)]
    assert answers == expected


@pytest.mark.parametrize(
    "family", ["gpt_oss", "cohere2_moe", "granitemoe_swa", "mistral4", "muse_spark", "qwen3_vl_moe"]
)
def test_sinks_windows_and_parts_of_composites(family: str, tmp_path: Path) -> None:
    configs.build(family, tmp_path)
    _shrink_window(tmp_path / "config.json")
    plain = configs.load(family, tmp_path)
    prompts = [[5 + (i * k) % 97 for i in range(1, n)] for k, n in ((3, 22), (7, 6), (11, 15))]
    expected = [greedy_alone(plain, p, 6) for p in prompts]
    with understudy.load(tmp_path, slots=4, dtype="float32") as model:
        driver = Driver(paged(model))
        rows = [driver.enter(p) for p in prompts]
        driver.step({rows[0]: 13, rows[1]: 5})
        driver.step({rows[0]: 8, rows[2]: 14})
        driver.answer(rows, 6)
    assert [r.tokens[len(p) :][:6] for r, p in zip(rows, prompts, strict=True)] == expected


def _shrink_window(config: Path) -> None:
    """Windows of nine tokens, so that short prompts leave them."""
    found = json.loads(config.read_text())
    for part in (found, *(v for v in found.values() if isinstance(v, dict))):
        if part.get("sliding_window"):
            part["sliding_window"] = 9
    config.write_text(json.dumps(found))


def test_a_family_that_it_does_not_fit_says_why_and_stays_as_it_was(tmp_path: Path) -> None:
    configs.build("deepseek_v3", tmp_path)
    plain = configs.load("deepseek_v3", tmp_path)
    with understudy.load(tmp_path, dtype="float32") as model:
        with pytest.raises(Unpaged, match="DeepseekV3ForCausalLM"):
            paged(model)
        assert greedy_alone(model, PROMPTS[0], 3) == greedy_alone(plain, PROMPTS[0], 3)


def test_a_shared_beginning_is_computed_once_and_changes_nothing(
    tiny: Callable[..., Path],
) -> None:
    prompt = [3 + (7 * i) % 90 for i in range(3 * PAGE + 5)]
    other = [*prompt[: 2 * PAGE], 9, 9, 9]
    with understudy.load(tiny(), slots=8) as model:
        seats = paged(model)
        driver = Driver(seats)
        first = driver.enter(prompt)
        assert first.done == 0
        driver.answer([first], 5)
        again, beside = driver.enter(prompt), driver.enter(other)
        assert (again.done, beside.done) == (3 * PAGE, 2 * PAGE)
        driver.answer([again, beside], 5)
        assert again.tokens == first.tokens
        seats.release(first)
        kept = driver.enter(prompt)  # of rows that have left
        assert kept.done == 3 * PAGE
        whole = driver.enter(other, shares_prefix=False)
        assert whole.done == 0
        driver.answer([kept, whole], 5)
        assert kept.tokens == again.tokens and whole.tokens == beside.tokens
        for row in driver.rows:
            seats.release(row)
        assert seats.used == 0


def test_room_is_given_back_and_old_beginnings_make_room(tiny: Callable[..., Path]) -> None:
    with understudy.load(tiny(), slots=8) as model:
        seats = paged(model, capacity=4 * PAGE)
        driver = Driver(seats)
        row = driver.enter([5] * (3 * PAGE))
        driver.answer([row], 1)
        late = Row("late", [6] * (2 * PAGE))
        seats.admit(late)
        assert not seats.reserve(late, 2 * PAGE)
        assert seats.used == 3 * PAGE
        seats.release(row)
        assert seats.reserve(late, 2 * PAGE)
        assert seats.reserve(late, 4 * PAGE)  # what was kept of the other one is gone
        assert not seats.reserve(late, 4 * PAGE + 1)
        seats.release(late)


def test_logits_of_every_position_are_those_of_a_plain_forward(tiny: Callable[..., Path]) -> None:
    folder = tiny()
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with understudy.load(folder, slots=8) as model, torch.inference_mode():
        seats = paged(model)
        rows = [Row(str(i), list(p), shares_prefix=False) for i, p in enumerate(PROMPTS[:2])]
        for row in rows:
            seats.admit(row)
            seats.reserve(row, len(row.tokens))
        one = seats.forward([Chunk(rows[0], 4, "all"), Chunk(rows[1], 3, "last")])
        two = seats.forward([Chunk(rows[0], 7, "all")])
        expected = plain(input_ids=torch.tensor([PROMPTS[0]])).logits[0]
    torch.testing.assert_close(torch.cat([one[0], two[0]]), expected, rtol=1e-4, atol=1e-5)
    assert one[1] is not None and one[1].shape == (1, expected.shape[1])


def test_neighbours_change_no_bit_of_a_rows_attention(tiny: Callable[..., Path]) -> None:
    """Projections of more rows may round differently; the sums over keys are a row's own."""
    from understudy.batch.attention import _one

    dice = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 4, n, 16, generator=dice) for n in (1, 37, 37))
    alone = _one(q, k, v, None, None, None, None)
    far = torch.randn(1, 4, 100, 16, generator=dice)
    packed = _one(q, torch.cat([far, k], 2)[:, :, 100:], v, None, None, None, None)
    assert torch.equal(alone, packed)


def test_one_packed_step_reads_an_expert_once_for_all_rows(tiny: Callable[..., Path]) -> None:
    with understudy.load(tiny(), slots=4, predictor="none") as model:
        seats = paged(model)
        model.understudy.start_recording()
        driver = Driver(seats)
        rows = [driver.enter(p) for p in PROMPTS]
        before = model.understudy.counters
        driver.answer(rows, 3)
        counters = model.understudy.counters - before
        events = model.understudy.stop_recording()
    assert counters.steps == 3
    assert counters.lookups == sum(len({e for row in event.ids for e in row}) for event in events)
    assert counters.tokens == sum(map(len, PROMPTS)) + 2 * len(PROMPTS)
    requests = [event.requests for event in events if event.layer == 0]
    assert requests[0] == [0] * 11 + [1] * 3 + [2] * 7 and requests[1] == [0, 1, 2]


def test_rows_that_share_pages_may_have_more_keys_than_the_cache(tiny: Callable[..., Path]) -> None:
    folder = tiny()
    begin = [5 + i % 80 for i in range(6 * PAGE)]
    prompts = [[*begin, 7 + i] for i in range(4)]
    plain = AutoModelForCausalLM.from_pretrained(folder)
    expected = [greedy_alone(plain, p, 6) for p in prompts]
    with understudy.load(folder, slots=8) as model:
        seats = Paged(model, capacity=10 * PAGE, max_rows=4, max_batch_tokens=128)
        driver = Driver(seats)
        driver.answer([driver.enter(prompts[0])], 1)
        rows = [driver.rows[0], *(driver.enter(p) for p in prompts[1:])]
        driver.answer(rows[1:], 1)
        driver.answer(rows, 5)
        assert seats.used <= seats.capacity < sum(len(row.tokens) for row in rows)
    answers = [row.tokens[len(p) :] for row, p in zip(rows, prompts, strict=True)]
    assert answers == expected


def test_rows_that_share_pages_may_have_more_tokens_than_there_are_pages(
    tiny: Callable[..., Path],
) -> None:
    folder, prompt = tiny("qwen3_moe"), [3 + (7 * i) % 90 for i in range(4 * PAGE + 3)]
    expected = greedy_alone(AutoModelForCausalLM.from_pretrained(folder), prompt, 6)
    with understudy.load(folder, slots=8) as model:
        seats = Paged(model, capacity=10 * PAGE, max_rows=6, max_batch_tokens=32)
        driver = Driver(seats)
        rows = [driver.enter(prompt)]
        driver.answer(rows, 1)
        rows += [driver.enter(prompt) for _ in range(5)]
        driver.answer(rows[1:], 1)
        driver.answer(rows, 5)  # 432 tokens read, and room for 160
        assert seats.used == 10 * PAGE
    assert [row.tokens[len(prompt) :] for row in rows] == [expected] * 6


def test_the_longest_row_fits_alone_whatever_the_mixture_of_layers(tmp_path: Path) -> None:
    """Pages are given to kinds of layers by the sector, and no two kinds share one."""
    kinds = ["sliding_attention"] * 2 + ["full_attention"] * 3
    config = GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=16, head_dim=8, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, num_hidden_layers=5,
        layer_types=kinds, sliding_window=128, max_position_embeddings=128, eos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with understudy.load(tmp_path, dtype="float32") as model:
        for pages in (2, 3, 7):
            seats = Paged(model, capacity=pages * PAGE, max_rows=2, max_batch_tokens=32)
            row = Row("alone", [5] * seats.capacity)
            seats.admit(row)
            assert seats.reserve(row, seats.capacity)
            seats.close()
