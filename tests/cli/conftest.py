"""Runs the command line in this process, with an engine that needs no model."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cli import fake_engine

from understudy.cli import main, session


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The last line of stdout."""
        return json.loads(self.out.splitlines()[-1])


Command = Callable[..., Ended]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    fake = fake_engine.module()
    monkeypatch.setitem(sys.modules, "understudy.engine", fake)
    monkeypatch.setattr(session, "quiet_guests", lambda: None)
    yield fake


@pytest.fixture
def understudy(
    engine: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Command:
    """``understudy("run", "model", "prompt")`` -> how it ended."""

    def command(*arguments: str, typed: str = "") -> Ended:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(list(arguments))
        printed = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return Ended(end.value.code, printed.out, printed.err)

    return command


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A models folder with one reference model, and a cache beside it."""
    folder = tmp_path / "models" / "fine"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(1 << 20))
    monkeypatch.setenv("UNDERSTUDY_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("UNDERSTUDY_CACHE", str(tmp_path / "cache"))
    return folder
