"""Which tiles the kernels of `swiglu` use for experts of a shape: measured once per device, kept.

Knows: candidates, how to time them on slots that hold anything, where the answer is stored. Does
not know: models, budgets, policies.

Bits depend on tiles, so two loads may never choose differently: the first measurement is written
down and every later load reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from understudy import native, whole
from understudy.experts.device import Device
from understudy.experts.device.slab import Slab
from understudy.experts.device.swiglu import Block, Strip, Swiglu, Tiles

HIDDEN = (
    Strip(),
    Strip(rows=8, warps=8),
    Strip(rows=2, warps=2, registers=128),
    Strip(registers=64),
    Strip(rows=2, lanes=64),
)
DOWN = (
    Strip(rows=2, warps=2, registers=128, together=2),
    Strip(rows=4, warps=4, registers=128, together=2),
    Strip(rows=2, warps=2, registers=255, together=4),
    Strip(rows=2, warps=2, registers=80),
    Strip(rows=1, lanes=128, registers=128, together=2),
)
MANY = (Block(), Block(rows=32), Block(rows=128, warps=8), Block(lines=64, stages=4))
MANY_FP32 = (Block(rows=32, lines=64, depth=64), Block(rows=32, lines=32, depth=128))
CALLS = 24  # of one measurement; each reads other experts, so that no cache holds them
ROUNDS = 5
TOKENS = 512  # of a call of `many`
EXPERTS = 64  # that they are spread over


@dataclass(frozen=True, slots=True)
class Choice:
    """``why``: in a few words, for people. ``microseconds``: of a call with these tiles, of one
    token (`few`) and of `TOKENS` (`many`), as measured."""

    tiles: Tiles
    why: str
    microseconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class Trial:
    """Where candidates are tried. ``arena``: of slots that may hold anything and are only read;
    ``ranks``: k."""

    device: Device
    slab: Slab
    format: str
    dtype: torch.dtype
    arena: torch.Tensor
    slot_bytes: int
    ranks: int

    def kernel(self, tiles: Tiles) -> Swiglu:
        return Swiglu(
            self.device, self.slab, self.format, self.dtype, self.arena, self.slot_bytes,
            self.ranks, tiles=tiles, distinct=EXPERTS,
        )  # fmt: skip

    @property
    def slots(self) -> int:
        return len(self.arena) // self.slot_bytes


def choose(trial: Trial) -> Choice:
    """The tiles for these experts on this device."""
    file = native.cache_folder() / "kernels" / f"tiles-{_key(trial)}.json"
    return _read(file) or _measure_once(file, trial)


def _key(trial: Trial) -> str:
    """Everything a measurement depends on."""
    import triton

    here = Path(__file__)
    code = [here.with_name(n).read_text() for n in ("kernels.py", "swiglu.py", here.name)]
    shapes = [(f.name, str(f.dtype), f.shape) for f in trial.slab.fields.values()]
    parts = (trial.device.name, torch.__version__, triton.__version__, code, shapes, trial.format,
             str(trial.dtype), trial.ranks)  # fmt: skip
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def _read(file: Path) -> Choice | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(file.read_text())
        tiles = Tiles(Strip(**kept["hidden"]), Strip(**kept["down"]), Block(**kept["many"]))
        times = {name: float(time) for name, time in kept["microseconds"].items()}
        return Choice(tiles, "measured on this device", times)
    return None


def _measure_once(file: Path, trial: Trial) -> Choice:
    """Measure, and write it down unless another process was quicker."""
    try:
        with whole.first(file) as temporary:
            tiles, times = _measure(trial)
            kept = {**asdict(tiles), "microseconds": times, "device": trial.device.name}
            temporary.write_text(json.dumps(kept))
            if file.exists() and _read(file) is None:
                file.unlink(missing_ok=True)  # damaged
    except OSError:
        why = f"{file.parent} cannot be written, so not measured"
        return Choice(Tiles.usual(trial.dtype), why, {})
    return _read(file) or Choice(tiles, "measured just now", times)


def _measure(trial: Trial) -> tuple[Tiles, dict[str, float]]:
    """The best tile of each kernel, the others being as chosen so far."""
    tiles, times = Tiles.usual(trial.dtype), {}
    many = MANY_FP32 if trial.dtype == torch.float32 else MANY
    rounds: Sequence[tuple[str, Sequence[Strip | Block], Callable[..., float]]] = (
        ("hidden", HIDDEN, _few), ("down", DOWN, _few), ("many", many, _many),
    )  # fmt: skip
    for name, candidates, time in rounds:
        tried = dict(_timed(trial, tiles, name, candidates, time))
        best = min(tried, key=tried.__getitem__)
        tiles = replace(tiles, **{name: best})
        times["many" if name == "many" else "few"] = round(1e6 * tried[best], 2)
    return tiles, times


def _timed(
    trial: Trial, tiles: Tiles, name: str, candidates: Sequence[Any], time: Callable[..., float]
) -> Iterator[tuple[Any, float]]:
    """Seconds of each candidate that this device can run; the usual one comes first, and must."""
    import triton

    for candidate in candidates:
        try:
            yield candidate, time(trial, trial.kernel(replace(tiles, **{name: candidate})))
        except triton.TritonError:  # too large for its shared memory or registers
            if candidate == candidates[0]:
                raise


def _few(trial: Trial, kernel: Swiglu) -> float:
    """Device seconds of one token, in a graph: from the host's side a launch takes longer than the
    kernel."""
    device, where = trial.device, trial.device.torch_device
    x = torch.randn(1, kernel.hidden).to(trial.dtype).to(where)
    weights = torch.full((1, trial.ranks), 1 / trial.ranks, device=where)
    calls = [
        (torch.arange(trial.ranks) + n * trial.ranks).remainder(trial.slots).int()[None].to(where)
        for n in range(CALLS)
    ]
    kernel.few(x, calls[0], weights)  # compiles
    graph = device.graph()
    graph.begin()
    try:
        for slots in calls:
            kernel.few(x, slots, weights)
    finally:
        graph.end()
    return min(_seconds(device, graph.replay) for _ in range(ROUNDS)) / CALLS


def _many(trial: Trial, kernel: Swiglu) -> float:
    """Device seconds of many tokens, spread over experts by chance."""
    device, where = trial.device, trial.device.torch_device
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, kernel.hidden, generator=dice).to(trial.dtype).to(where)
    most = min(EXPERTS, trial.slots)
    slots = torch.randint(most, (TOKENS, trial.ranks), generator=dice).int().to(where)
    into = torch.empty(TOKENS, trial.ranks, kernel.hidden, dtype=trial.dtype, device=where)
    kernel.many(x, slots, into)  # compiles
    return min(_seconds(device, lambda: kernel.many(x, slots, into)) for _ in range(ROUNDS))


def _seconds(device: Device, work: Callable[[], object]) -> float:
    """Of what ``work`` asks the device for."""
    start = device.compute.record(timed=True)
    work()
    end = device.compute.record(timed=True)
    end.synchronize()
    return end.seconds_since(start)
