"""A policy that changes who runs is obeyed and counted; nothing here does so by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import understudy
from understudy import Engine
from understudy.core import Counters, ExpertId, LayerEvent, UnderstudyError
from understudy.policies import MissResolver, Resolution, RouteTransform
from understudy.policies.residency import Residency

IDS = torch.arange(2, 9).unsqueeze(0)


@pytest.fixture
def fine() -> Path:
    found = Path(__file__).parents[3] / "models" / "fine"
    if not found.is_dir():
        pytest.skip("models/fine is not here")
    return found


class AlwaysTheFirstTwo(RouteTransform):
    def transform(self, event: LayerEvent, book: Residency) -> LayerEvent:
        return replace(event, ids=[[0, 1] for _ in event.ids])


class NeverFetch(MissResolver):
    def resolve(
        self, event: LayerEvent, missing: Sequence[ExpertId], book: Residency
    ) -> Resolution:
        return Resolution()


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


def test_what_only_a_device_can_do_is_refused_without_one(
    tiny: Callable[[str, str], Path],
) -> None:
    with pytest.raises(UnderstudyError, match="--resolver cpu-split computes misses in host"):
        understudy.load(tiny("mixtral", "float32"), resolver="cpu-split")


def test_exact_runs_count_nothing_lossy(tiny: Callable[[str, str], Path]) -> None:
    with understudy.load(tiny("mixtral", "float32"), slots=3) as model:
        logits(model)
        counters = model.understudy.counters
    assert counters.substituted == counters.skipped == 0


PROMPT = list(range(2, 40))


def generated(path: Path, **options: Any) -> tuple[list[torch.Tensor], Counters]:
    """Logits of 24 dictated tokens after a prompt, and what was counted while decoding."""
    with Engine(path, slots=24, max_context=128, **options) as engine:
        made = engine.generate(
            PROMPT, max_new_tokens=24, dictated=PROMPT[:24], keep_logits=True, ignore_eos=True
        )
    assert made.logits is not None
    return made.logits, made.decode_counters


def test_a_foretold_layer_is_executed_and_counted(fine: Path) -> None:
    exact, nothing = generated(fine, predictor="next-gate")
    other, counted = generated(fine, predictor="next-gate", route="speculated")
    assert nothing.substituted == nothing.substituted_mass == 0
    assert torch.equal(exact[0], other[0])  # the prompt is routed as it asks
    assert not torch.equal(exact[-1], other[-1])
    assert counted.substituted > 0
    # Nine of ten layers are foretold, four experts each: somewhat under a quarter is wrong.
    assert 0.05 < counted.substituted / (24 * 9 * 4) < 0.5


@pytest.mark.parametrize(
    "route", ["verified:below=0", "buddy:stand_in=drop:percentile=0:rho=0",
              "buddy:stand_in=random:percentile=0:beta=0"],
)  # fmt: skip
def test_a_lossy_route_that_is_off_changes_no_bit(fine: Path, route: str) -> None:
    exact, _ = generated(fine)
    off, counted = generated(fine, route=route)
    assert all(map(torch.equal, exact, off))
    assert counted.substituted == counted.skipped == 0


@pytest.mark.parametrize("stand_in", ["random", "drop"])
def test_a_stand_in_costs_no_bytes_and_is_counted(fine: Path, stand_in: str) -> None:
    route = f"buddy:stand_in={stand_in}:percentile=0:beta=1.1:rho=2"
    exact, plain = generated(fine, predictor="none")
    other, counted = generated(fine, predictor="none", route=route)
    assert not torch.equal(exact[-1], other[-1])
    acted, idle = counted.skipped, counted.substituted
    mass, none = counted.skipped_mass, counted.substituted_mass
    if stand_in == "random":
        acted, idle, mass, none = idle, acted, none, mass
    assert acted > 50
    assert idle == none == 0
    assert 0 < mass / acted < 1 / 4  # the lightest first: under the mean weight of four
    assert counted.demand_bytes < 0.8 * plain.demand_bytes


def test_nothing_is_kept_from_token_to_token_in_the_paper_s_way(fine: Path) -> None:
    with Engine(fine, slots="2k", max_context=128, evictor="lru-global", predictor="next-gate",
                route="speculated", self_switch=False) as engine:  # fmt: skip
        assert engine.plan.slots == 8
        made = engine.generate(PROMPT, max_new_tokens=12, ignore_eos=True)
        layers = len(engine.model.understudy.anatomy.modules)
    counted = made.decode_counters
    assert counted.hits + counted.late + counted.misses == 11 * layers * 4
    # Whatever was there or under way had been read for this very token.
    assert counted.hits + counted.late == counted.prefetch_used
