"""``trace`` and ``compare`` for real, on the small reference model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from understudy.cli import main
from understudy.core import Phase
from understudy.trace import read

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


# ----------------------------------------------------------------------------------------- trace


def test_a_trace_is_recorded_and_summarised(real: Real, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    code, out, _ = real(
        *("trace", str(FINE), "-o", str(path), "--sequences", "2", "-p", "12", "--tokens", "9"),
        *("--scores", "--json", *SMALL),
    )
    assert code == 0
    found = read(path)
    assert last(out)["rows"] == 2 * 10 * (12 + 8)  # the last answer token is never fed back
    prompts = [e for e in found.events if e.phase is Phase.PREFILL]
    assert len(prompts) == 2 * 10
    assert len(found.events) == 2 * 10 * (1 + 8)
    for event in found.events:
        assert event.scores is not None
        for ids, weights, scores in zip(event.ids, event.weights, event.scores, strict=True):
            assert sum(scores) == pytest.approx(1, abs=1e-3)
            others = [scores[e] for e in range(32) if e not in ids]
            assert min(scores[e] for e in ids) >= max(others)  # this family takes the likeliest
            chosen = sum(scores[e] for e in ids)
            assert list(weights) == pytest.approx([scores[e] / chosen for e in ids], abs=0.01)
    seen = [e for e in found.events if e.phase is Phase.DECODE and e.layer < 9]
    assert all(set(e.lookahead) == {e.layer + 1} for e in seen)

    picture = tmp_path / "t.png"
    code, out, _ = real("trace", "--summary", str(path), "--plot", str(picture), "--json")
    assert (code, picture.read_bytes()[:4]) == (0, b"\x89PNG")
    assert [one["layer"] for one in last(out)["layers"]] == list(range(10))
    assert last(out)["overall"]["overlap_uniform"] == pytest.approx(4 / 32)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "name the trace to write with -o"),
        (("-o", "t.parquet"), "name a MODEL to record"),
        (("--summary", "none.parquet"), "no such trace"),
        (("--import", "none.csv", "-o", "t.parquet"), "none.csv: cannot be read"),
        ((str(FINE), "-o", "t.parquet", "--data", "none.txt"), "none.txt: cannot be read as text"),
    ],
)
def test_trace_refuses_what_cannot_work(
    real: Real, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: Any, complaint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = real("trace", *arguments)
    assert (code, err.count("error:")) == (2, 1)
    assert complaint in err
    assert list(tmp_path.iterdir()) == []


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
