"""Which model under which memory limit: the cells of a benchmark, and the wide twins they run on.

Knows: how a cell is written (``fine:33``, ``coarse:ram``), what limit it means, where twins and
GGUF files are cached. Does not know: who runs in a cell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from understudy import demo
from understudy.core import UnderstudyError

# Interpreter, torch, transformers: given to every contestant beside its share of the model.
BESIDE_BYTES = 700 << 20
# Expert width times this (hidden size times four): twins of 3 GB; `fine` then has experts of
# 9.4 MB, as Qwen3-30B-A3B has, `coarse` of 47 MB.
WIDE = {"fine": 16, "coarse": 15}
SMOKE_WIDE = {"fine": 2, "coarse": 1}

Bar = Callable[[str], Callable[[int, int], None]]


@dataclass(frozen=True, slots=True)
class Cell:
    """``percent`` of the model's bytes; ``None``: all of it in RAM, no limit."""

    model: str
    percent: float | None

    @classmethod
    def parse(cls, text: str) -> Cell:
        model, _, share = text.strip().partition(":")
        if model not in WIDE:
            raise UnderstudyError(f"no model {model!r} to bench; use {' or '.join(WIDE)}")
        if share == "ram":
            return cls(model, None)
        try:
            percent = float(share)
        except ValueError:
            percent = 0.0
        if not 0 < percent <= 100:
            raise UnderstudyError(f"cannot read the cell {text!r}; write {model}:33 or {model}:ram")
        return cls(model, percent)

    @property
    def name(self) -> str:
        return f"{self.model}:{'ram' if self.percent is None else f'{self.percent:g}'}"

    @property
    def fraction(self) -> float | None:
        return None if self.percent is None else self.percent / 100

    def budget(self, model_bytes: int) -> int | None:
        """What Understudy is told; the others are only limited from outside."""
        return None if self.fraction is None else int(self.fraction * model_bytes)

    def limit(self, model_bytes: int) -> int | None:
        """What the memory cgroup allows each contestant."""
        budget = self.budget(model_bytes)
        return None if budget is None else budget + BESIDE_BYTES


def parse_cells(text: str) -> list[Cell]:
    """``fine:33,coarse:ram``, each once, in the order given."""
    return list(dict.fromkeys(Cell.parse(part) for part in text.split(",") if part.strip()))


def twin(model: str, bar: Bar, smoke: bool = False) -> Path:
    """The wide twin that a cell of ``model`` runs on, made once into the cache."""
    multiple = (SMOKE_WIDE if smoke else WIDE)[model]
    source = demo.models_folder() / model
    return source if multiple == 1 else demo.twin_of(source, bar, multiple)


def stored_bytes(model: Path) -> int:
    """Bytes of the weights as they lie on disk; of a single file, its size."""
    files = [model] if model.is_file() else sorted(model.glob("*.safetensors"))
    return sum(file.stat().st_size for file in files)


def weight_files(model: Path) -> list[Path]:
    return [model] if model.is_file() else sorted(model.glob("*.safetensors"))
