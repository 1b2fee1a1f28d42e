"""Who runs in place of whom, worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from understudy.core import NOBODY, ExpertId, LayerEvent, Phase, UnderstudyError
from understudy.policies.buddy import Buddy, entropy
from understudy.policies.residency import Residency
from understudy.policies.route import Speculated, Verified
from understudy.registry import ROUTES

EXPERTS = 6
SCORES = [0.30, 0.25, 0.20, 0.12, 0.08, 0.05]


def book(*experts: int) -> Residency:
    made = Residency(8)
    for expert in experts:
        made.reserve(ExpertId(0, expert))
        made.launch(ExpertId(0, expert))
        made.land(ExpertId(0, expert))
    return made


def event(**changes: Any) -> LayerEvent:
    """One token; experts 0, 1, 2 with weights 0.4, 0.35, 0.25."""
    told: dict[str, Any] = {
        "ids": [[0, 1, 2]], "weights": [[0.4, 0.35, 0.25]], "scores": [SCORES],
    }  # fmt: skip
    return LayerEvent(step=7, layer=0, phase=Phase.DECODE, **{**told, **changes})


@dataclass
class Known:
    """Expert 2 is mostly chosen with 4, then with 3, then with 5; its output is most like 5's."""

    coactivation: Sequence[Any] = field(default_factory=lambda: [_table({3: 30, 4: 60, 5: 10})])
    similarity: Sequence[Any] = field(default_factory=lambda: [_table({3: 0.1, 4: -0.5, 5: 0.8})])
    entropy: Sequence[Any] = field(default_factory=lambda: [[p / 100 for p in range(101)]])


def _table(peers: dict[int, float]) -> list[list[float]]:
    row = [peers.get(e, 0.0) for e in range(EXPERTS)]
    return [row for _ in range(EXPERTS)]


def buddy(**parameters: Any) -> Buddy:
    return Buddy(layers=1, experts=[EXPERTS], learned=Known(), **{"percentile": 0, **parameters})


# ----------------------------------------------------------------------------------- speculated


def test_what_was_foretold_runs_with_its_weights() -> None:
    told = [[5, 0, 1]], [[0.5, 0.3, 0.2]]
    runs = Speculated().transform(event(foretold=told), book())
    assert (runs.ids, runs.weights) == told


@pytest.mark.parametrize("changes", [{"foretold": None}, {"phase": Phase.PREFILL}])
def test_prompts_and_layers_without_a_forecast_run_as_routed(changes: dict[str, Any]) -> None:
    asked = event(foretold=([[5, 0, 1]], [[0.5, 0.3, 0.2]]))
    for name, value in changes.items():
        setattr(asked, name, value)
    assert Speculated().transform(asked, book()) is asked
    assert Verified(below=1).transform(asked, book()) is asked


# ------------------------------------------------------------------------------------- verified


def test_a_foretold_resident_stands_in_for_a_light_missing_expert_only() -> None:
    told = [[5, 4, 3]], [[0.5, 0.3, 0.2]]
    asked = event(foretold=told)
    runs = Verified(below=0.3).transform(asked, book(0, 4, 3))
    assert runs.ids == [[0, 1, 4]]  # 1 is missing too, and too heavy; 5 is not here, 4 comes next
    assert list(runs.weights) == [[0.4, 0.35, 0.25]]
    assert Verified(below=0.2).transform(asked, book(0, 4, 3)) is asked
    assert Verified(below=0).transform(asked, book(0, 4, 3)) is asked
    assert Verified(below=1).transform(asked, book(0, 1, 2, 4)) is asked  # nobody is missing


def test_nobody_stands_in_twice_for_one_token() -> None:
    runs = Verified(below=1).transform(event(foretold=([[4, 0, 1]], [[1, 1, 1]])), book(4))
    assert runs.ids == [[0, 1, 4]]  # the lightest first; then nobody is left


# ---------------------------------------------------------------------------------------- buddy


def test_the_best_resident_buddy_stands_in_and_carries_the_weight() -> None:
    runs = buddy(eta=0).transform(event(), book(0, 1, 3, 4))
    assert runs.ids == [[0, 1, 4]]
    assert runs.weights == [[0.4, 0.35, 0.25]]
    assert buddy(eta=0).transform(event(), book(0, 1, 3)).ids == [[0, 1, 3]]


def test_the_router_s_opinion_counts_by_eta() -> None:
    """q: 4 has 0.6, 3 has 0.3. z: 0.08 / 0.3 and 0.12 / 0.3. Equal at eta = 0.3 / -0.04: never;
    with scores turned round it is 0.6 (1 + eta 0.1) against 0.3 (1 + eta 1): from eta 1.25 on."""
    scores = [[0.3, 0.25, 0.09, 0.3, 0.03, 0.03]]
    assert buddy(eta=1.2).transform(event(scores=scores), book(0, 1, 3, 4)).ids == [[0, 1, 4]]
    assert buddy(eta=1.3).transform(event(scores=scores), book(0, 1, 3, 4)).ids == [[0, 1, 3]]


def test_a_buddy_list_ends_where_it_has_its_mass() -> None:
    assert buddy(alpha=0.6).transform(event(), book(0, 1, 3)).ids == [[0, 1, 2]]  # only 4 is listed
    assert buddy(alpha=0.61).transform(event(), book(0, 1, 3)).ids == [[0, 1, 3]]
    assert buddy(cap=1).transform(event(), book(0, 1, 3)).ids == [[0, 1, 2]]


def test_own_weight_keeps_the_token_s_sum() -> None:
    runs = buddy(weight="own").transform(event(), book(0, 1, 4))
    assert runs.ids == [[0, 1, 4]]
    assert runs.weights[0] == pytest.approx([x / 0.63 for x in (0.30, 0.25, 0.08)])


def test_rho_limits_the_stand_ins_and_the_lightest_go_first() -> None:
    few = {"beta": 1.1, "eta": 0}
    assert buddy(rho=1, **few).transform(event(), book(4, 3)).ids == [[0, 1, 4]]
    assert buddy(rho=2, **few).transform(event(), book(4, 3)).ids == [[0, 3, 4]]


@pytest.mark.parametrize("off", [{"rho": 0}, {"beta": 0}])
def test_off_is_off(off: dict[str, Any]) -> None:
    asked = event()
    assert buddy(**off).transform(asked, book(0, 1, 3, 4)) is asked


def test_the_batch_gate_closes_where_most_are_missing() -> None:
    asked = event()  # 2 of 3 missing
    assert buddy(beta=0.66).transform(asked, book(0, 4)) is asked
    assert buddy(beta=0.67).transform(asked, book(0, 4)) is not asked


def test_the_token_gate_spares_a_clear_choice() -> None:
    clear = [[0.90, 0.05, 0.05]]
    share = entropy(clear[0])
    assert share == pytest.approx(0.394 / 1.0986, abs=1e-3)
    asked, here = event(weights=clear), book(0, 1, 4)
    assert buddy(percentile=int(100 * share) + 1).transform(asked, here) is asked
    assert buddy(percentile=int(100 * share)).transform(asked, here).ids == [[0, 1, 4]]


def test_controls() -> None:
    here = book(0, 1, 3, 4, 5)
    assert buddy(stand_in="similar").transform(event(), here).ids == [[0, 1, 5]]
    dropped = buddy(stand_in="drop").transform(event(), here)
    assert (dropped.ids, dropped.weights) == ([[0, 1, NOBODY]], [[0.4, 0.35, 0.0]])
    assert list(dropped.needed()) == [0, 1]
    drawn = [buddy(stand_in="random", seed=s).transform(event(), here).ids[0][2] for s in range(40)]
    assert set(drawn) == {3, 4, 5}
    again = [buddy(stand_in="random", seed=s).transform(event(), here).ids[0][2] for s in range(40)]
    assert drawn == again


def test_a_buddy_needs_a_profile_and_says_so() -> None:
    with pytest.raises(UnderstudyError, match="understudy profile"):
        ROUTES.make("buddy", layers=1, experts=[EXPERTS])
    assert ROUTES.make("buddy:stand_in=drop:percentile=0:rho=2", layers=1, experts=[6]).rho == 2


def test_parameters_are_checked() -> None:
    with pytest.raises(UnderstudyError, match="no parameter 'roh'; it has rho, beta"):
        ROUTES.check("buddy:roh=2")
    with pytest.raises(UnderstudyError, match="it has none"):
        ROUTES.check("as-routed:x=1")
    with pytest.raises(UnderstudyError, match="name:key=value"):
        ROUTES.check("buddy:rho")
    with pytest.raises(UnderstudyError, match="stand_in is one of"):
        buddy(stand_in="best")
