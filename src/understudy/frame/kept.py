"""Compiled layers kept on disk: a later start reads their steps and needs no compiler at all.

Knows: `Notes` as plain values, the files of inductor's loops, the cache folder. Does not know: what
a layer computes, how it is traced or repeated.

inductor has a cache of its own, but importing inductor, tracing a layer and asking that cache takes
seconds. What a `Program` needs is a list of numbers and some ten shared objects, so that is kept:
one JSON file per kind of layer, and the objects beside it under the checksums of their contents.
A damaged or missing file is a layer that was never kept: it is compiled again. So is one whose
name, made of everything that its code depends on, differs in anything.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from understudy import native
from understudy.frame.program import Native, Notes, Opaque, Spot, View

# What says which checkpoint this is, not how a layer of it computes.
_IDLE = ("_name_or_path", "transformers_version", "architectures", "torch_dtype")


def name_of(layer: nn.Module, config: Any, facts: Sequence[Any]) -> str:
    """One word for all that the code of ``layer`` depends on: this package, torch, transformers,
    the processor and its compiler, the layer's source, the model's configuration, and ``facts``."""
    settings = {k: v for k, v in config.to_dict().items() if k not in _IDLE}
    parts = (
        _own_sources(),
        native.identity(),
        torch.__version__,
        transformers.__version__,
        f"{type(layer).__module__}.{type(layer).__qualname__}",
        _source(type(layer).__module__),
        json.dumps(settings, sort_keys=True, default=str),
        *map(repr, facts),
    )
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=12).hexdigest()


@cache
def _own_sources() -> str:
    files = sorted(Path(__file__).parent.glob("*.py"))
    return _digest(b"\0".join(file.read_bytes() for file in files))


@cache
def _source(module: str) -> str:
    try:
        return inspect.getsource(sys.modules[module])
    except (OSError, TypeError, KeyError):
        return ""


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _folder() -> Path:
    return native.cache_folder() / "layers"


# ------------------------------------------------------------------------------ keep and find


def keep(name: str, notes: Notes) -> str:
    """Write ``notes`` and the loops they call. Returns why they could not be kept (a disk that is
    full or read-only), or nothing."""
    folder = _folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = {path: _keep_loop(path, folder) for path in _loops(notes)}
        plain = json.dumps(_plain(notes, files))
        record = {"notes": plain, "checksum": _digest(plain.encode())}
        _write(folder / f"{name}.json", json.dumps(record).encode())
        return ""
    except OSError as e:
        return f"{folder}: {e.strerror}"


def find(name: str) -> Notes | None:
    """What was kept under ``name``; ``None``: nothing was, or not all of it is whole."""
    folder = _folder()
    try:
        record = json.loads((folder / f"{name}.json").read_bytes())
        plain = record["notes"]
        if _digest(plain.encode()) != record["checksum"]:
            return None
        notes = _notes(json.loads(plain), folder)
        if any(_digest(Path(path).read_bytes()) != Path(path).stem for path in _loops(notes)):
            return None
        return notes
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget(name: str) -> None:
    """What was kept under ``name`` turned out to be wrong."""
    (_folder() / f"{name}.json").unlink(missing_ok=True)


def _loops(notes: Notes) -> set[str]:
    return {s.library for s in notes.steps if isinstance(s, Native) and s.library}


def _keep_loop(path: str, folder: Path) -> str:
    content = Path(path).read_bytes()
    name = f"{_digest(content)}.so"
    if not (folder / name).exists():
        _write(folder / name, content)
    return name


def _write(path: Path, content: bytes) -> None:
    """All of it or nothing, also when two processes write the same."""
    handle, room = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(room, path)
    except OSError:
        os.unlink(room)
        raise


# ----------------------------------------------------------------------------- as plain values


def _plain(notes: Notes, files: Mapping[str, str]) -> Any:
    steps = []
    for s in notes.steps:
        if isinstance(s, Native):
            steps.append(["native", s.kind, s.spots, s.numbers, files.get(s.library, "")])
        else:
            steps.append([s.name, s.reads, s.answer, s.nbytes])
    return [steps, notes.nbytes, notes.result]


def _notes(plain: Any, folder: Path) -> Notes:
    steps, nbytes, result = plain
    return Notes(tuple(_step(s, folder) for s in steps), nbytes, _view(result))


def _step(plain: Any, folder: Path) -> Native | Opaque:
    name, *rest = plain
    if name == "native":
        kind, spots, numbers, file = rest
        library = str(folder / file) if file else ""
        return Native(kind, tuple(Spot(*s) for s in spots), tuple(numbers), library)
    reads, answer, nbytes = rest
    return Opaque(name, tuple(map(_view, reads)), Spot(*answer), nbytes)


def _view(plain: Any) -> View:
    spot, dtype, shape, strides = plain
    return View(Spot(*spot), dtype, tuple(shape), tuple(strides))
