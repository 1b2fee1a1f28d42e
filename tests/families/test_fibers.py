"""In every family two rows that run as fibers, with experts coming and going, answer what each is
answered alone by plain transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import configs

import understudy
from understudy.batch import Chunk, Row
from understudy.batch.fibers import Fibers, Unbatchable
from understudy.families import families, support

TOLERANCE = 3e-6  # of the largest logit; fp32, another summation order
STEPS = 4
PROMPTS = ([7, 9, 40, 22, 31, 8, 15, 16, 77], [50, 11, 12])

# They answer in other ways than token by token.
OTHERS = ("diffusion_gemma", "openai_privacy_filter")


def alone(plain: Any, prompt: Sequence[int]) -> tuple[list[int], torch.Tensor]:
    """The greedy answer to one prompt, and its logits."""
    ids = torch.tensor([prompt])
    out = plain.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=STEPS, do_sample=False,
        eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return out.sequences[0, len(prompt) :].tolist(), torch.cat(out.logits)


def together(seats: Fibers) -> tuple[list[Row], list[torch.Tensor]]:
    """The first prompt in two chunks, where that is allowed, the second of them beside the second
    prompt; then a token each."""
    rows = [Row(str(len(prompt)), list(prompt)) for prompt in PROMPTS]
    for row in rows:
        seats.admit(row)
        assert seats.reserve(row, len(row.tokens) + STEPS)
    if not seats.whole_prompts:
        seats.forward([Chunk(rows[0], 5, "none")])
    logits: list[list[torch.Tensor]] = [[], []]
    for _ in range(STEPS):
        outs = seats.forward([Chunk(row, len(row.tokens) - row.done, "last") for row in rows])
        for row, found, out in zip(rows, logits, outs, strict=True):
            assert out is not None
            found.append(out[0])
            row.tokens.append(int(out[0].argmax()))
    return rows, [torch.stack(found) for found in logits]


@pytest.mark.parametrize(
    "family", [n for n in families() if support()[n].supported and n not in OTHERS]
)
def test_rows_of_every_family_answer_as_alone(family: str, tmp_path: Path) -> None:
    plain = configs.build(family, tmp_path)
    expected = [alone(plain, prompt) for prompt in PROMPTS]
    with understudy.load(
        tmp_path, slots=3, dtype="float32", io_threads=1, prefill_chunk_size=None
    ) as model:
        for module in model.modules():  # left behind by a prompt with images
            if hasattr(module, "rope_deltas"):
                module.rope_deltas = torch.tensor([[5]])
        seats = Fibers(model, capacity=100)
        rows, logits = together(seats)
        model.understudy.runtime.director.book.check_integrity(idle=True)
        assert seats.apart == {}, "later routers can be asked about all rows"
    for row, found, (tokens, wanted) in zip(rows, logits, expected, strict=True):
        assert row.tokens[-STEPS:] == tokens
        assert (found - wanted).abs().max() <= TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize("family", OTHERS)
def test_models_that_answer_otherwise_are_refused(family: str, tmp_path: Path) -> None:
    configs.build(family, tmp_path)
    with (
        understudy.load(tmp_path, slots=3, prefill_chunk_size=None) as model,
        pytest.raises(Unbatchable, match="does not answer token by token"),
    ):
        Fibers(model, capacity=100)
