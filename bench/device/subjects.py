"""The models that are measured, made on the spot: wide twins of a trained one, and a recorded one.

Knows: which sizes there are and what each is for, where they are kept, what they are asked to read
and write. Does not know: who runs them, or how fast.

A trained model has the layers and experts that it has: `fine` 10 of 32. A twin makes its experts
wider, never more. So ``twin`` has experts of Qwen3-30B-A3B's size and 3 GB of them, ``twin-large``
30 GB of larger ones, and ``qwen3`` the layers, experts and bytes of the real one, but no words.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import contest, show
from bench.device.figures import Facts
from understudy import demo, native
from understudy import model as guest
from understudy import plan as planning
from understudy.core import UnderstudyError
from understudy.loading import Anatomy
from understudy.plan import shown_size

RAM_DISK = Path("/dev/shm")
POSITIONS = 4096  # of a twin: it was trained on 1,024, and prompts of 2,048 are only timed
WIDER = {"twin": (4, 16), "twin-large": (16, 40)}  # hidden size and expert width times this
SMALL = {"twin": (1, 1), "twin-large": (1, 2)}
NAMES = (*WIDER, "qwen3")


@dataclass(frozen=True)
class Subject:
    """``source``: what an engine loads. ``prompts``, ``answers``: one of each per round, the first
    and the last to compare, the others to time. ``before``: called with the engine and the number
    of the round. ``settings``: further options of every load."""

    name: str
    source: Any
    facts: Facts
    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    settings: dict[str, Any] = field(default_factory=dict)
    before: Callable[[Any, int], None] = lambda engine, number: None

    @property
    def folder(self) -> Path | None:
        """Where others can load it from; ``None``: only we can."""
        return self.source if isinstance(self.source, Path) else None


@dataclass(frozen=True, slots=True)
class Wanted:
    """``rounds``: counted ones. ``trace``: a public route CSV. ``recall``: of what look-ahead is
    told, where routing is forced. ``small``: a try on any machine."""

    rounds: int = 5
    prompt_tokens: int = 128
    new_tokens: int = 33
    trace: str | None = None
    recall: float = 0.9
    seed: int = 0
    small: bool = False


def make(name: str, wanted: Wanted) -> Subject:
    """Made now where it is not in the cache. Raises `UnderstudyError` where it cannot be."""
    if name in WIDER:
        return _twin(name, wanted)
    if name != "qwen3":
        raise UnderstudyError(f"no model {name!r}; use {', '.join(NAMES)}")
    if wanted.trace is None:
        raise UnderstudyError("qwen3 needs the recorded routing: --trace FILE")
    return _recorded(name, Path(wanted.trace), wanted)


# ------------------------------------------------------------------------------------------ twins


def _twin(name: str, wanted: Wanted) -> Subject:
    original = demo.models_folder() / "fine"
    hidden, width = (SMALL if wanted.small else WIDER)[name]
    folder = widened(original, hidden, width)
    anatomy = Anatomy.of(folder)
    words = (
        f"fine (trained, 10 layers of 32 experts), {hidden} x the hidden size and "
        f"{width} x the expert width, padded with zeros"
    )
    course = contest.texts(folder, wanted.rounds + 2, wanted.prompt_tokens, wanted.new_tokens)
    return Subject(
        name, folder, facts_of(anatomy, True, words), course.prompts, course.answers,
        {"max_context": wanted.prompt_tokens + wanted.new_tokens + 64},
    )  # fmt: skip


def widened(original: Path, hidden: int, width: int) -> Path:
    """The twin's folder; it can take prompts of `POSITIONS` tokens."""
    from understudy.widen import twin_bytes, widen

    name = f"{original.name}-{demo.fingerprint(original)}-h{hidden}-e{width}-p{POSITIONS}"
    needed = twin_bytes(original, hidden, width)
    folder = store(needed) / name
    if folder.is_dir():
        return folder
    demo.check_disk(folder.parent, needed)
    partial = folder.with_name(f".{name}.made")
    shutil.rmtree(partial, ignore_errors=True)
    widen(original, partial, hidden, width, show.progress(f"making {name}"))
    config = json.loads((partial / "config.json").read_text(encoding="utf-8"))
    config["max_position_embeddings"] = POSITIONS
    (partial / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    partial.rename(folder)
    return folder


def store(needed: int) -> Path:
    """Where so many bytes are kept: the cache folder; a RAM disk where the disk is too small for
    them and memory is not. What is there already is found again in either."""
    cache = native.cache_folder() / "gpu"
    cache.mkdir(parents=True, exist_ok=True)
    if needed < shutil.disk_usage(cache).free or not RAM_DISK.is_dir():
        return cache
    # The file, its copy in pinned memory, and as much again for all others.
    room = min(shutil.disk_usage(RAM_DISK).free, planning.free_memory() // 3)
    if needed > room:
        raise UnderstudyError(
            f"a model of {shown_size(needed)} fits neither on the disk of {cache} nor on a RAM "
            "disk; name another disk in UNDERSTUDY_CACHE"
        )
    folder = RAM_DISK / f"understudy-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    return folder


# --------------------------------------------------------------------------------------- recorded


def _recorded(name: str, trace: Path, wanted: Wanted) -> Subject:
    """Qwen3-30B-A3B's shape, as many layers as this machine's memory holds."""
    from bench.device import forced

    shape, recorded = forced.QWEN3, forced.Routes.read(trace)
    if wanted.small:
        shape = forced.Shape(hidden=64, width=32, heads=2, kv_heads=1, head=32, vocab=4096)
        recorded = recorded.cut(4)
    routes = recorded.cut(_held_layers(name, recorded.experts * 6 * shape.hidden * shape.width))
    folder = native.cache_folder() / "gpu" / f"{name}-{shape.hidden}x{shape.width}"
    anatomy = forced.forced(folder, shape, routes, wanted.recall, wanted.seed)
    layers, of, k = routes.ids.shape[1], recorded.ids.shape[1], routes.ids.shape[2]
    less = "" if layers == of else f", {layers} of its {of} layers for want of memory"
    words = (
        f"Qwen3-30B-A3B's shape{less}, random weights, routing forced from {trace.name} "
        f"(top-{k} as recorded, one prompt of {routes.tokens} tokens: flatters a cache); what "
        f"look-ahead is told has recall {wanted.recall:g}, by assumption"
    )
    # The recorded prompt's length is read in each round; all of it moves on through the record.
    rounds = wanted.rounds + 2
    step = max(1, min(wanted.new_tokens - 1, (routes.tokens - routes.prompt) // rounds))
    dice = torch.Generator().manual_seed(wanted.seed)
    texts = torch.randint(1, shape.vocab, (rounds, routes.prompt + step + 1), generator=dice)
    return Subject(
        name, anatomy, facts_of(anatomy, False, words),
        texts[:, : routes.prompt].tolist(), texts[:, routes.prompt :].tolist(),
        {"max_context": 256, "direct_io": False, "io_threads": min(8, os.cpu_count() or 1)},
        lambda engine, number: _move_on(engine, number * step),
    )  # fmt: skip


def _held_layers(name: str, nbytes: int) -> int:
    """Of ``nbytes`` each, in host memory beside everything else."""
    held = int(0.8 * planning.free_memory()) // nbytes
    if held < 2:
        raise UnderstudyError(f"{name}: two layers of it need {shown_size(2 * nbytes)} free")
    return held


def _move_on(engine: Any, row: int) -> None:
    """The next round's position 0 is this row of the record."""
    with torch.inference_mode():  # as the engine's own work
        engine.model.place.offset.fill_(row)


# ------------------------------------------------------------------------------------------ facts


def facts_of(anatomy: Anatomy, trained: bool, words: str) -> Facts:
    config = anatomy.checkpoint.config
    dtype = anatomy.dtype("auto")
    resident = anatomy.dense_bytes(dtype)
    return Facts(
        layers=len(anatomy.modules),
        experts=len(anatomy.layouts),
        top_k=guest.experts_per_token(config),
        expert_bytes=anatomy.expert_bytes,
        resident_bytes=resident,
        dense_bytes=resident - _embedding_bytes(anatomy, dtype.itemsize),
        trained=trained,
        words=words,
    )


def _embedding_bytes(anatomy: Anatomy, itemsize: int) -> int:
    """Of a table of which a token reads one row; 0 where it is also the output's matrix."""
    if getattr(anatomy.checkpoint.config, "tie_word_embeddings", False):
        return 0
    return int(anatomy.bones.get_input_embeddings().weight.numel()) * itemsize
