"""Budgets, prefetching, eviction, threads and the order of arrival never change a bit; and the
bits are those of transformers, up to rounding."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from understudy.engine import load
from understudy.experts.store import Chunk

NEW = 12
PROMPT = 21
CHUNK = 8

CASES = pytest.mark.parametrize(
    ("family", "dtype"),
    [(f, d) for f in ("mixtral", "qwen3_moe") for d in ("float32", "bfloat16")],
)

# One thing at a time, then everything at once. `slots` of 24 (mixtral) or 32 experts.
VARIANTS: dict[str, dict[str, Any]] = {
    "two slots": {"slots": 2},
    "two slots, no prefetch": {"slots": 2, "predictor": "none"},
    "a third": {"slots": 9},
    "a third, no prefetch": {"slots": 9, "predictor": "none"},
    "depth 2": {"slots": 9, "depth": 2},
    "last token": {"slots": 9, "predictor": "last-token"},
    "popularity": {"slots": 9, "predictor": "popularity", "depth": 2},
    "everything fits, prefetch": {"slots": 32, "depth": 2},
    "lru-global": {"slots": 9, "evictor": "lru-global"},
    "lru-layer": {"slots": 9, "evictor": "lru-layer"},
    "lfu": {"slots": 9, "evictor": "lfu"},
    "lfru": {"slots": 9, "evictor": "lfru"},
    "one thread": {"slots": 9, "io_threads": 1},
    "eight threads": {"slots": 9, "io_threads": 8},
    "buffered": {"slots": 9, "direct_io": False},
    "all at once": {
        "slots": 5,
        "depth": 2,
        "evictor": "lfru",
        "io_threads": 8,
        "direct_io": False,
        "predictor": "last-token",
    },
}


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[Any]:
    options = {"prefill_chunk_size": CHUNK, "self_switch": False, **options}
    with load(folder, "1GiB", **options) as model:
        yield model
        runtime = model.understudy.runtime
        with runtime._lock:
            runtime.transfer.settle()
            runtime.director.book.check_integrity(idle=True)


def answer(model: Any, batch: dict[str, torch.Tensor], new: int = NEW) -> torch.Tensor:
    """Logits of a chunked prefill and ``new`` greedy steps: [new, rows, vocabulary]."""
    with torch.inference_mode():
        out = model.generate(
            **batch,
            max_new_tokens=new,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.stack(out.logits)


def everywhere(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits at every real position of one unchunked forward."""
    with torch.inference_mode():
        return model(**batch).logits[batch["attention_mask"].bool()]


@pytest.fixture(scope="module")
def resident(tiny: Callable[..., Path]) -> Callable[..., torch.Tensor]:
    """The same seam with all experts in memory, loaded one after the other on demand."""

    @cache
    def run(family: str, dtype: str) -> torch.Tensor:
        with opened(tiny(family, dtype), slots=64, predictor="none", io_threads=1) as model:
            found = answer(model, PROMPTS)
            assert model.understudy.counters.evictions == 0
        return found

    return run


PROMPTS = {
    "input_ids": torch.randint(3, 96, (1, PROMPT), generator=torch.Generator().manual_seed(5)),
    "attention_mask": torch.ones(1, PROMPT, dtype=torch.long),
}


@CASES
@pytest.mark.parametrize("variant", VARIANTS)
def test_not_a_bit(
    tiny: Callable[..., Path],
    resident: Callable[..., torch.Tensor],
    family: str,
    dtype: str,
    variant: str,
) -> None:
    options = VARIANTS[variant]
    with opened(tiny(family, dtype), **options) as model:
        found = answer(model, PROMPTS)
        counted = model.understudy.counters
    assert torch.equal(found, resident(family, dtype))
    if options["slots"] < 24:
        assert counted.evictions > 0  # or this has shown nothing
    if "depth" in options and options["slots"] < 24:
        assert counted.prefetch_issued > 0


@pytest.mark.parametrize("seed", range(3))
@CASES
def test_not_a_bit_whatever_arrives_first(
    tiny: Callable[..., Path],
    resident: Callable[..., torch.Tensor],
    family: str,
    dtype: str,
    seed: int,
) -> None:
    dice = random.Random(seed)
    with opened(tiny(family, dtype), slots=5, io_threads=6) as model:
        source = model.understudy.runtime.transfer.source
        honest, order = source.read, []

        def dawdle(chunk: Chunk) -> None:
            time.sleep(dice.random() / 1000)
            honest(chunk)
            order.append(chunk.offset)

        source.read = dawdle
        found = answer(model, PROMPTS)
    assert torch.equal(found, resident(family, dtype))
    assert order != sorted(order)


@CASES
def test_a_warm_model_answers_as_a_cold_one(
    tiny: Callable[..., Path], tokens: Callable[..., Any], family: str, dtype: str
) -> None:
    with opened(tiny(family, dtype), slots=7) as model:
        cold = answer(model, PROMPTS)
        answer(model, tokens(13, seed=9), new=4)
        assert torch.equal(answer(model, PROMPTS), cold)


# -------------------------------------------------------------------------- against transformers


def close_enough(found: torch.Tensor, expected: torch.Tensor) -> None:
    """fp32: rounding only. The eager loop sums experts in another order."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 3e-6 * expected.abs().max()
    assert torch.equal(found.argmax(-1), expected.argmax(-1))


@pytest.fixture(scope="module")
def plain(tiny: Callable[..., Path]) -> Callable[[str], Any]:
    """transformers alone, fully resident."""

    @cache
    def get(family: str) -> Any:
        model = AutoModelForCausalLM.from_pretrained(
            tiny(family), experts_implementation="eager"
        ).eval()
        model.generation_config.prefill_chunk_size = CHUNK
        return model

    return get


FAMILIES = pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])


@FAMILIES
@pytest.mark.parametrize("slots", [2, 9, 32])
def test_the_answer_of_transformers(
    tiny: Callable[..., Path], plain: Callable[[str], Any], family: str, slots: int
) -> None:
    with opened(tiny(family), slots=slots) as model:
        close_enough(answer(model, PROMPTS), answer(plain(family), PROMPTS))
        close_enough(everywhere(model, PROMPTS), everywhere(plain(family), PROMPTS))


@FAMILIES
def test_a_padded_batch(
    tiny: Callable[..., Path], plain: Callable[[str], Any], tokens: Callable[..., Any], family: str
) -> None:
    batch = tokens(5, 17, 2, seed=3)
    with opened(tiny(family), slots=6) as model:
        close_enough(everywhere(model, batch), everywhere(plain(family), batch))
        close_enough(answer(model, batch), answer(plain(family), batch))


@FAMILIES
def test_padding_asks_for_no_expert(
    tiny: Callable[..., Path], tokens: Callable[..., Any], family: str
) -> None:
    batch = tokens(1, 12, seed=3)
    with opened(tiny(family), slots=6) as model:
        model.understudy.start_recording()
        everywhere(model, batch)
        events = model.understudy.stop_recording()
    assert {len(e.ids) for e in events} == {13}
    assert {tuple(e.requests) for e in events} == {(0,) + (1,) * 12}


def test_who_taps_hears_of_every_event(
    tiny: Callable[..., Path], tokens: Callable[..., Any]
) -> None:
    heard: list[Any] = []
    with opened(tiny("mixtral"), slots=6) as model:
        runtime = model.understudy.runtime
        model.understudy.start_recording()
        runtime.tap = heard.append
        everywhere(model, tokens(1, 12, seed=3))
        runtime.tap = None
        everywhere(model, tokens(1, 12, seed=3))
        events = model.understudy.stop_recording()
    assert len(heard) == len(events) / 2
    assert all(one is other for one, other in zip(heard, events, strict=False))


def test_the_padded_row_is_the_lonely_row(
    tiny: Callable[..., Path], tokens: Callable[..., Any]
) -> None:
    batch = tokens(5, 17, seed=3)
    alone = {name: t[:1, -5:] for name, t in batch.items()}
    with opened(tiny("mixtral"), slots=6) as model:
        together = answer(model, batch)[:, :1]
        close_enough(together, answer(model, alone))


def test_an_fp32_computation_on_a_bf16_checkpoint(tiny: Callable[..., Path]) -> None:
    folder = tiny("qwen3_moe", "bfloat16")
    other = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    with opened(folder, slots=9, dtype="float32") as model:
        assert model.dtype == torch.float32
        close_enough(everywhere(model, PROMPTS), everywhere(other, PROMPTS))
