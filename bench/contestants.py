"""Who runs: the table of contestants, and what each needs to be there.

A new contestant is one line in `TABLE`. Knows: names, formats, which file each one reads, why one
cannot run here. Does not know: how rounds are timed, what a row looks like.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.cells import Bar, Cell, stored_bytes
from understudy import demo, native
from understudy.core import UnderstudyError

OWN = "bench.own:Understudy"
LLAMA = "bench.peers.llama:Llama"
ANCHOR = "understudy"  # whom every ratio is against


@dataclass(frozen=True, slots=True)
class Contestant:
    """``runner``: module:class of the worker; ``format``: of the experts; ``reads``: checkpoint,
    gguf or packed; ``told``: whether it is given the budget as an option; ``where``: limited
    cells, ram, or both; ``seconds``: of decoding per round, where it can stop early."""

    name: str
    runner: str
    format: str = "bf16"
    reads: str = "checkpoint"
    needs: tuple[str, ...] = ()
    told: bool = False
    where: tuple[str, ...] = ("limited", "ram")
    seconds: float = 12.0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def own(self) -> bool:
        return self.runner == OWN

    def runs_in(self, cell: Cell) -> bool:
        return ("ram" if cell.percent is None else "limited") in self.where


TABLE = (
    Contestant(ANCHOR, OWN, told=True),
    Contestant(
        "understudy-noprefetch",
        OWN,
        told=True,
        where=("limited",),  # in RAM there is nothing to fetch
        options={"predictor": "none"},
    ),
    Contestant("understudy-int8", OWN, "int8", "packed", told=True),
    Contestant("understudy-int4", OWN, "int4", "packed", told=True),
    Contestant(
        "understudy-int4-noprefetch",
        OWN,
        "int4",
        "packed",
        told=True,
        where=("limited",),
        options={"predictor": "none"},
    ),
    Contestant("llama.cpp-bf16", LLAMA, "bf16", "gguf", ("llama_cpp", "gguf")),
    Contestant("llama.cpp-q8_0", LLAMA, "q8_0", "gguf", ("llama_cpp", "gguf")),
    Contestant("llama.cpp-q4_0", LLAMA, "q4_0", "gguf", ("llama_cpp", "gguf")),
    Contestant("transformers", "bench.peers.plain:Transformers", where=("ram",)),
    Contestant(
        "accelerate",
        "bench.peers.plain:Accelerated",
        needs=("accelerate",),
        told=True,
        where=("limited",),
        seconds=6.0,
    ),
)
NAMES = tuple(one.name for one in TABLE)


def chosen(names: str | None) -> list[Contestant]:
    """Those named (all without names); a name may be a beginning: ``llama.cpp`` means all three."""
    if names is None:
        return list(TABLE)
    found: dict[str, Contestant] = {}
    for name in (part.strip() for part in names.split(",")):
        exact = [one for one in TABLE if one.name == name]
        meant = exact or [one for one in TABLE if one.name.startswith(name)]
        if not meant:
            raise UnderstudyError(f"no contestant {name!r}; use {', '.join(NAMES)}")
        found.update({one.name: one for one in meant})
    return [one for one in TABLE if one.name in found]


class CannotRun(Exception):
    """A contestant that is not here: a skipped row, never a failure. Its text is the reason."""


def prepared(contestant: Contestant, twin: Path, bar: Bar) -> Path:
    """What ``contestant`` reads of ``twin``, written now if it is not in the cache."""
    missing = [one for one in contestant.needs if importlib.util.find_spec(one) is None]
    if missing:
        raise CannotRun(f"{missing[0]} is not installed; make bench-peers installs it")
    if contestant.reads == "gguf":
        return _as_gguf(contestant.format, twin, bar)
    if contestant.reads == "packed":
        return _packed(contestant.format, twin, bar)
    return twin


def _as_gguf(quantization: str, twin: Path, bar: Bar) -> Path:
    from bench.peers import gguf_file

    path = native.cache_folder() / f"{twin.name}-{quantization}.gguf"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        demo.check_disk(path.parent, stored_bytes(twin))
        gguf_file.write(twin, path, quantization, bar(f"writing {path.name}, once"))
    return path


def _packed(form: str, twin: Path, bar: Bar) -> Path:
    """``understudy pack`` writes it, where this version has that command."""
    path = native.cache_folder() / f"{twin.name}-{form}"
    if path.is_dir():
        return path
    if importlib.util.find_spec("understudy.packing") is None:
        raise CannotRun(f"this version of Understudy cannot pack {form} experts")
    from understudy.packing import pack

    demo.check_disk(path.parent, stored_bytes(twin))
    pack(twin, form, path, bar=bar)
    return path
