"""Every family of the installed transformers, run with about 30 % of its expert bytes in memory,
answers what plain transformers answers with everything resident."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import configs

import understudy
from understudy.families import families, support

EXPERTS_HELD = 0.3
TOLERANCE = 3e-6  # of the largest output; fp32, another summation order


def first_output(outputs: object) -> torch.Tensor:
    """Logits, or the hidden state of a family without a language-model head."""
    for name in ("logits", "last_hidden_state"):
        found = getattr(outputs, name, None)
        if isinstance(found, torch.Tensor):
            return found
    raise AssertionError(f"{type(outputs).__name__} has neither logits nor a hidden state")


def run(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """One forward. Seeded: a diffusion model draws the canvas it starts from."""
    torch.manual_seed(0)
    with torch.no_grad():
        return first_output(model(**inputs))


@pytest.mark.parametrize("family", [n for n in families() if support()[n].supported])
def test_logits_equal_the_resident_model(family: str, tmp_path: Path) -> None:
    configs.build(family, tmp_path)
    plain = configs.load(family, tmp_path)
    inputs = configs.inputs(family, plain)
    expected = run(plain, inputs)
    experts = sum(module.num_experts for module, _ in configs.experts_of(plain))
    slots = max(2, int(EXPERTS_HELD * experts))
    with understudy.load(tmp_path, slots=slots, dtype="float32", io_threads=2) as model:
        first, again = run(model, inputs), run(model, inputs)
        counters = model.understudy.counters
        model.understudy.runtime.director.book.check_integrity(idle=True)
    assert counters.misses > slots, "the experts never had to make room for each other"
    assert torch.equal(first, again), "the second run, with a warm cache, must not differ by a bit"
    assert (first - expected).abs().max() <= TOLERANCE * expected.abs().max()


def test_reasons_are_given_for_the_rest() -> None:
    for name, (supported, reason) in support().items():
        assert supported or reason, name
