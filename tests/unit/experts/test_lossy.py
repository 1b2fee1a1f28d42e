"""A policy that changes who runs is obeyed and counted; nothing here does so by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

import understudy
from understudy.core import ExpertId, LayerEvent
from understudy.policies import MissResolver, RouteTransform
from understudy.policies.residency import Residency

IDS = torch.arange(2, 9).unsqueeze(0)


class AlwaysTheFirstTwo(RouteTransform):
    def transform(self, event: LayerEvent, book: Residency) -> LayerEvent:
        return replace(event, ids=[[0, 1] for _ in event.ids])


class NeverFetch(MissResolver):
    def fetch(self, event: LayerEvent, missing: Sequence[ExpertId]) -> Iterator[ExpertId]:
        return iter(())


def logits(model: object) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits  # type: ignore[operator]
    return found


def test_substitutes_run_and_are_counted(tiny: Callable[[str, str], Path]) -> None:
    with understudy.load(tiny("mixtral", "float32"), slots=4, predictor="none") as model:
        exact = logits(model)
        before = model.understudy.counters
        model.understudy.runtime.director.route = AlwaysTheFirstTwo()
        other = logits(model)
        counted = model.understudy.counters - before
    assert not torch.equal(exact, other)
    assert counted.substituted > 0
    assert counted.lookups == 2 * counted.events  # experts 0 and 1 in every layer, nobody else


def test_what_is_not_fetched_contributes_nothing_and_is_counted(
    tiny: Callable[[str, str], Path],
) -> None:
    with understudy.load(tiny("mixtral", "float32"), slots=4, predictor="none") as model:
        model.understudy.runtime.director.resolver = NeverFetch()
        first, again = logits(model), logits(model)
        counters = model.understudy.counters
        layers = len(model.understudy.anatomy.modules)
    assert torch.isfinite(first).all()
    assert torch.equal(first, again)
    assert counters.demand_bytes == 0
    assert counters.skipped == 2 * layers * IDS.numel() * 2  # two forwards, top-2


def test_exact_runs_count_nothing_lossy(tiny: Callable[[str, str], Path]) -> None:
    with understudy.load(tiny("mixtral", "float32"), slots=3) as model:
        logits(model)
        counters = model.understudy.counters
    assert counters.substituted == counters.skipped == 0
