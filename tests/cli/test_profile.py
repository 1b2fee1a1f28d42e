"""profile: end to end on a reference model, and what it refuses before anything slow begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli.conftest import Command

import understudy.learn  # noqa: F401  with the real engine, before a fixture fakes one
from understudy.cli import main
from understudy.profile import Profile

FINE = Path(__file__).parents[2] / "models" / "fine"

FACTS = {
    "model": "small", "fingerprint": "abc", "layers": 2, "experts": [3, 3], "top_k": 1,
    "data": [{"name": "a.txt", "bytes": 9, "sha256": "0"}], "window": 4, "seed": 0,
    "tokens": {"read": 100, "learned": 80, "chosen": 12, "reported": 8}, "smoothing": 16.0,
    "rarely_chosen": [0, 2], "never_chosen": [0, 1], "sensitivity": [0.5, 0.125], "seconds": 7.4,
    "recall": {"router-input": [None, 0.75], "last-token": [0.25, 0.5]},
    "weighted_recall": {"router-input": [None, 0.875], "last-token": [0.125, 0.375]},
    "cosine": {"router-input": [None, 0.5]}, "estimator": None, "estimator_better": None,
}  # fmt: skip


@pytest.fixture
def shown(tmp_path: Path) -> Path:
    import torch

    file = tmp_path / "small.safetensors"
    Profile({"uses": torch.ones(2, 3)}, FACTS).save(file)
    return file


def test_show_prints_the_tables_of_a_file(understudy: Command, shown: Path) -> None:
    ended = understudy("profile", "--show", str(shown))
    assert ended.code == 0
    lines = [line.split() for line in ended.out.splitlines()]
    assert ["0", "-", "25.0", "(12.5)"] in lines
    assert ["1", "75.0", "(87.5)", "50.0", "(37.5)"] in lines
    assert ["0", "-", "0.50000", "0", "0"] in lines
    assert ["1", "0.500", "0.12500", "2", "1"] in lines
    assert "100: 80 to learn from, 12 to choose by, 8 reported" in ended.out


def test_show_as_json(understudy: Command, shown: Path) -> None:
    ended = understudy("profile", "--show", str(shown), "--json")
    assert ended.json == {"profile": shown.name, **FACTS}
    assert ended.out.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "say which MODEL to learn about, or --show FILE"),
        (("m", "-o", "no/such/folder/p.safetensors"), "name a file in a folder that exists"),
        (("--show", "nothing.safetensors"), "no such profile; make it with `understudy profile`"),
        (("m", "--data", "nothing.txt"), "cannot read nothing.txt"),
        (("m", "--tokens", "0"), "--tokens"),
    ],
)
def test_what_cannot_work_is_refused_first(
    understudy: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...], complaint: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    ended = understudy("profile", *arguments)
    assert ended.code == 2
    assert complaint in ended.err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_end_to_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not (FINE / "config.json").exists():
        pytest.skip("models/fine is not here")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([
            "profile", str(FINE), "--tokens", "1600", "--window", "64", "--memory", "48MiB",
            "--estimator", "--estimator-epochs", "1", "--estimator-width", "16", "--json",
        ])  # fmt: skip
    printed = capsys.readouterr()
    assert end.value.code == 0
    assert "no --data: learning from Python's own manual" in printed.err
    facts = json.loads(printed.out.splitlines()[-1])
    assert [p.name for p in tmp_path.iterdir()] == ["fine.profile.safetensors"]
    assert facts["profile"] == "fine.profile.safetensors"
    made = Profile.load(tmp_path / facts["profile"], facts["fingerprint"])
    assert made.tensor("default_vectors").shape == (10, 32, 256)
    assert made.tensor("uses").sum() == 10 * 4 * facts["tokens"]["learned"]
    assert made.tensor("estimator.down.weight").shape == (16, 256)
    # A trained model's next routers know far more than popularity does.
    recall = facts["recall"]
    assert all(a > b + 0.1 for a, b in zip(recall["quasi"][1:], recall["popularity"][1:],
                                           strict=True))  # fmt: skip
    assert all(0 < x < 0.1 for x in facts["sensitivity"])
