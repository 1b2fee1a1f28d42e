"""``understudy eval`` end to end on small models: table, JSON, exit codes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli.conftest import Ended

from understudy.cli import main, session
from understudy.core import LayerEvent
from understudy.policies import RouteTransform
from understudy.policies.residency import Residency
from understudy.registry import ROUTES

DROP = "buddy:stand_in=drop:percentile=0:beta=1.1"
RANDOM = "buddy:stand_in=random:percentile=0:beta=1.1"
Eval = Callable[..., Ended]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    dice = np.random.default_rng(0)
    words = ["".join(dice.choice(list("etaoinshrdlu"), dice.integers(2, 8))) for _ in range(600)]
    file = tmp_path / "book.txt"
    file.write_text(" ".join(words))
    return file


@pytest.fixture
def evaluate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Eval:
    """``evaluate(model, ...)``: small, on the real engine; how it ended."""
    monkeypatch.setattr(session, "quiet_guests", lambda: None)
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "cache"))
    small = ("--tokens", "8", "-p", "12", "--max-context", "96", "--threads", "1")

    def command(model: Path, *arguments: str) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(["eval", str(model), *small, "--kernel", "torch", *arguments])
        printed = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return Ended(end.value.code, printed.out, printed.err)

    return command


def test_the_reference_model_end_to_end(
    evaluate: Eval, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = Path(__file__).parents[2] / "models" / "fine"
    if not fine.is_dir():
        pytest.skip("models/fine is not here")
    monkeypatch.delenv("UNDERSTUDY_CACHE")  # where the kernels may have been built already
    out = tmp_path / "eval.json"
    ended = evaluate(
        *(fine, "--policies", f"on-demand,understudy,{DROP}", "--memory", "50%", "--no-controls"),
        *("--problems", "1", "--json", "-o", str(out), "--kernel", "auto", "--tokens", "6"),
    )
    assert ended.code == 0
    assert json.loads(out.read_text()) == ended.json
    exact, own, lossy = ended.json["verdicts"]
    assert [v["policy"] for v in ended.json["verdicts"]] == ["on-demand", "understudy", DROP]
    assert own["identical"] and own["delta_nll"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert lossy["skipped"] > 0 and not lossy["identical"] and lossy["kl"]["mean"] > 0
    assert exact["tokens"] == 5 * 6
    assert set(exact["nll_by_domain"]) == {"python-docs"}
    assert len(exact["right"]) == 7
    assert exact["solved"]["all"]["right"] == sum(exact["right"]) / 7
    assert "fine: against the exact run" in ended.err
    assert "exact match on 7 held-out problems" in ended.err
    assert "seeds: problems and drawn experts 0, intervals 0" in ended.err


def test_controls_stand_beside_a_lossy_policy(
    evaluate: Eval, speaking_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from understudy import quality
    from understudy.bench import Policy

    # Its own controls need no profile here: the policy that is controlled for is random already.
    def both(policy: Policy) -> list[Policy]:
        routes = {"random": RANDOM, "drop": DROP}
        return [replace(policy, name=f"{policy.name} ({k})", route=r) for k, r in routes.items()]

    monkeypatch.setattr(quality, "controls", both)
    ended = evaluate(
        *(speaking_model, "--policies", RANDOM + ":rho=1", "--slots", "32", "--problems", "0"),
        *("--data", str(data), "--json"),
    )
    assert ended.code == 0
    names = [v["policy"] for v in ended.json["verdicts"]]
    own = RANDOM + ":rho=1"
    assert names == ["on-demand", own, f"{own} (random)", f"{own} (drop)", "all int8", "all int4"]
    by_name = {v["policy"]: v for v in ended.json["verdicts"]}
    changed = by_name[own]["substituted"]
    assert changed > 0
    assert by_name[f"{own} (drop)"]["skipped"] == pytest.approx(changed, rel=0.4)  # 40 tokens
    assert by_name["all int4"]["bytes"] < by_name["all int8"]["bytes"] < by_name[own]["bytes"]
    assert [(c["by"], c["against"]) for c in ended.json["controls"]] == [
        ("changed", f"{own} (random)"), ("changed", f"{own} (drop)"),
        ("bytes", "all int8"), ("bytes", "all int4"),
    ]  # fmt: skip
    assert f"matched count: {own} changed {changed:.2f} experts per token" in ended.err
    assert "all int4" in ended.err and "same memory:" in ended.err


class SaysItIsExact(RouteTransform):
    def transform(self, event: LayerEvent, book: Residency) -> LayerEvent:
        return replace(event, ids=[[0, 1] for _ in event.ids], weights=list(event.weights))


def test_a_lie_is_exit_code_1(
    evaluate: Eval, speaking_model: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ROUTES, "_objects", {**ROUTES._objects, "honest": SaysItIsExact})
    ended = evaluate(
        *(speaking_model, "--policies", "honest", "--data", str(data), "--problems", "0")
    )
    assert ended.code == 1
    assert "NOT exact, though it says so: honest" in ended.err


def test_idle_policies_are_named(evaluate: Eval, speaking_model: Path, data: Path) -> None:
    idle = "buddy:stand_in=drop:percentile=0:rho=0"
    ended = evaluate(
        *(speaking_model, "--policies", idle, "--data", str(data), "--problems", "0"),
        "--no-controls",
    )
    assert ended.code == 0
    assert f"{idle} never acted" in ended.err


def test_one_that_cannot_run_does_not_spoil_the_others(
    evaluate: Eval, speaking_model: Path, data: Path
) -> None:
    ended = evaluate(
        *(speaking_model, "--policies", "buddy,lru", "--data", str(data), "--problems", "0"),
        *("--json", "--no-controls"),
    )
    assert ended.code == 2
    assert [v["policy"] for v in ended.json["verdicts"]] == ["on-demand", "lru"]
    assert set(ended.json["failed"]) == {"buddy"}
    assert "buddy could not be judged: route buddy needs a profile" in ended.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--policies", "lru,lfuu"), "no policy named 'lfuu'; did you mean 'lfu'?"),
        (("--data", "no-such-file.txt"), "cannot read no-such-file.txt"),
        (("--tokens", "2000"), "book: too short for 5 pieces of 2013 tokens"),
        (("--sets", "3"), "--sets must be at least 5"),
        (("-o", "no/such/folder/eval.json"), "no/such/folder is no folder"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    evaluate: Eval, speaking_model: Path, data: Path, arguments: tuple[str, ...], complaint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from understudy import quality

    def never(*given: Any, **told: Any) -> None:
        raise AssertionError("an engine was opened")

    monkeypatch.setattr(quality, "Engine", never)
    given = arguments if "--data" in arguments else ("--data", str(data), *arguments)
    ended = evaluate(speaking_model, *given)
    assert ended.code == 2
    assert complaint in " ".join(ended.err.split())
