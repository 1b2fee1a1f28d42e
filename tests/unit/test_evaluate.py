"""Distances between models whose distributions are known by hand."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from understudy.evaluate import compared, distance


def constant(*probabilities: float) -> Any:
    """A model that expects the same distribution everywhere."""
    row = torch.tensor(probabilities).log()

    def forward(input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=row.expand(1, input_ids.shape[1], len(row)))

    return forward


def test_by_hand() -> None:
    found = distance(constant(0.5, 0.5), constant(0.25, 0.75), [0, 0, 1, 1, 0], window=3)
    # windows 0 0 1 and 1 0: the first token of each is only read; 0, 1, 0 are scored
    assert found.tokens == 3
    assert math.isclose(found.nll_exact, math.log(2), rel_tol=1e-6)
    assert math.isclose(found.nll, -(2 * math.log(0.25) + math.log(0.75)) / 3, rel_tol=1e-6)
    assert math.isclose(found.delta_nll, found.nll - found.nll_exact, rel_tol=1e-6)
    assert math.isclose(found.kl, math.log(2) - (math.log(0.5) + math.log(1.5)) / 2 - math.log(2),
                        rel_tol=1e-5)  # fmt: skip
    assert found.same_top1 == 0  # of two equal ones the first is liked best


def test_the_same_model_is_at_no_distance() -> None:
    model = constant(0.1, 0.2, 0.7)
    found = distance(model, model, [0, 1, 2] * 40, window=50)
    assert (found.delta_nll, found.kl, found.same_top1) == (0, 0, 1)
    assert (found.delta_low, found.delta_high) == (0, 0)


def test_a_single_token_is_no_text() -> None:
    with pytest.raises(ValueError, match="two tokens"):
        distance(constant(1.0), constant(1.0), [0])


def test_what_the_exact_run_rules_out_weighs_nothing() -> None:
    never = -torch.inf
    exact = torch.tensor([[0.0, 0.0, never]])
    other = torch.tensor([[0.0, 0.0, never]])
    found = compared(exact, other, torch.tensor([1]))
    assert found.kl.tolist() == [0.0]
    assert math.isclose(found.other[0], math.log(2), rel_tol=1e-6)
    assert compared(exact, torch.tensor([[0.0, never, 0.0]]), torch.tensor([0])).kl[0] == math.inf
