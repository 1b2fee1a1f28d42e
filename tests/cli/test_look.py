"""inspect and families."""

from __future__ import annotations

import pytest
from cli.conftest import Command

from understudy import families
from understudy.families import Support


def test_inspect_says_what_memory_to_type(understudy: Command) -> None:
    ended = understudy("inspect", "model")
    assert ended.code == 0
    assert "tiny_moe (TinyMoeForCausalLM)" in ended.out
    assert "8 in each of 2 layers, 16 in all, top-2" in ended.out
    assert "--memory 1MiB" in ended.out


def test_inspect_as_json(understudy: Command) -> None:
    ended = understudy("inspect", "model", "--json", "--max-context", "99")
    assert ended.out.count("\n") == 1
    assert ended.json["model"] == "model"
    assert ended.json["expert_bytes"] == 4096
    assert ended.json["context"] == 99


@pytest.fixture
def two_families(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"good": Support(True, "fine"), "bad": Support(False, "no experts interface")}
    monkeypatch.setattr(families, "support", lambda: known)


@pytest.mark.usefixtures("two_families")
def test_families_as_json_is_one_line(understudy: Command) -> None:
    ended = understudy("families", "--json")
    assert ended.out.count("\n") == 1
    assert ended.json == {
        "families": {
            "good": {"supported": True, "reason": "fine"},
            "bad": {"supported": False, "reason": "no experts interface"},
        }
    }


@pytest.mark.usefixtures("two_families")
def test_families_as_a_table(understudy: Command) -> None:
    ended = understudy("families")
    assert [line.split()[:2] for line in ended.out.splitlines()[1:]] == [
        ["good", "yes"],
        ["bad", "no"],
    ]
    assert "1 of 2 families work" in ended.err
