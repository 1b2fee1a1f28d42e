"""``compare`` for real, on the small reference model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from understudy.cli import main

FINE = Path(__file__).parents[2] / "models" / "fine"
SMALL = ("--max-context", "96", "--slots", "25%", "--threads", "1", "--frame", "eager")

Real = Callable[..., tuple[int, str, str]]


@pytest.fixture
def real(capsys: pytest.CaptureFixture[str]) -> Real:
    """A command line -> (exit code, stdout, stderr)."""
    if not FINE.is_dir():
        pytest.skip("models/fine is not here")

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        printed = capsys.readouterr()
        return int(end.value.code or 0), printed.out, printed.err

    return run


def last(out: str) -> Any:
    return json.loads(out.splitlines()[-1])


# --------------------------------------------------------------------------------------- compare

RACE = (
    *("compare", str(FINE), "--rounds", "1", "-p", "16", "-n", "4", "--tokens", "8", *SMALL),
    "--policies",
    "lru,buddy:stand_in=drop:percentile=0:beta=1.1,next-gate+speculated",
)


def test_the_arena_reports_and_goes_on_where_it_was(real: Real, tmp_path: Path) -> None:
    folder = tmp_path / "arena"
    code, out, _ = real(*RACE, "-o", str(folder), "--json")
    assert code == 0
    told = last(out)
    named = {entry["policy"]: entry for entry in told["entries"]}
    assert list(named)[:2] == ["on-demand", "lru"]
    for name in ("on-demand", "lru"):
        quality = named[name]["quality"]
        assert quality["identical"] is True
        assert quality["delta_nll"] == quality["kl"] == quality["substituted"] == 0
    dropped = named["buddy:stand_in=drop:percentile=0:beta=1.1"]
    assert dropped["quality"]["skipped"] > 0
    assert dropped["speed"]["bytes"] < named["on-demand"]["speed"]["bytes"]
    assert "next-gate+speculated" not in told["front"] or told["tpot_seconds"]
    files = {p.name for p in folder.iterdir()}
    assert {"report.html", "report.png", "report.json"} < files
    page = (folder / "report.html").read_text()
    assert "next-gate+speculated" in page
    assert "http" not in page.replace("http-equiv", "")  # everything is in the one file

    before = {p: p.stat().st_mtime_ns for p in folder.glob("*-*.json")}
    assert len(before) == 4
    victim = next(p for p in before if p.name.startswith("lru"))
    victim.unlink()
    code, out, _ = real(*RACE, "-o", str(folder), "--json")
    after = {p: p.stat().st_mtime_ns for p in folder.glob("*-*.json")}
    assert set(after) == set(before)
    assert [p for p in before if before[p] != after[p]] == [victim]


def test_what_stops_the_baseline_stops_the_race(real: Real, tmp_path: Path) -> None:
    code, _, err = real(*RACE[:-1], "lru", "-p", "200", "-o", str(tmp_path / "a"))
    assert code == 2
    assert "200 prompt tokens and 4 new ones exceed the context of 96" in err


def test_a_policy_that_cannot_run_here_says_why(real: Real, tmp_path: Path) -> None:
    code, out, err = real(*RACE[:-1], "quasi-gate", "-o", str(tmp_path / "a"), "--json")
    assert code == 0
    assert "needs a profile of this model" in last(out)["entries"][1]["why"]
    assert "quasi-gate: not run: predictor quasi-gate needs a profile" in err


def test_a_mistyped_policy_is_told_before_anything_is_done(real: Real, tmp_path: Path) -> None:
    code, _, err = real(*RACE[:-1], "budy", "-o", str(tmp_path / "a"))
    assert (code, (tmp_path / "a").exists()) == (2, False)
    assert "no policy named 'budy'; did you mean 'buddy'?" in err
