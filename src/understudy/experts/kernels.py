"""Which kernel computes an expert with so many tokens: measured once per machine, kept, pinned.

Knows: how to time the two kernels of `compute` on weights of a given layout, and where the answer
is stored. Does not know: models, budgets, policies.

Bits depend on the kernel, so two loads may never choose differently: the first measurement is
written down and every later load reads it. ``asked`` overrides it: ``torch``, ``native`` (for up to
`NATIVE_ROWS` tokens of an expert) or ``native:N``.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from understudy import native, whole
from understudy.core import ExpertLayout, UnderstudyError
from understudy.experts.compute import Batch, ExpertMlp
from understudy.experts.store import Weights

NATIVE_ROWS = 8  # where nobody may measure or write: the native kernel won up to here in all trials
TRIED = (1, 2, 4, 8, 16, 32)
COLD_BYTES = 96 << 20  # weights to cycle through, so that no cache holds them
MOST = 16  # experts that are cycled through, where they are small
ROUNDS = 5
ASKED = "asked for"


@dataclass(frozen=True, slots=True)
class Choice:
    """``rows``: up to how many tokens of an expert `native` computes them (0: never).
    ``why``: in a few words, for people. ``microseconds``: rows -> (native, torch), as measured."""

    rows: int
    why: str
    microseconds: dict[int, tuple[float, float]]

    @property
    def name(self) -> str:
        """As ``--kernel`` reads it: pinning this name repeats the choice."""
        return f"native:{self.rows}" if self.rows else "torch"


def parse(asked: str) -> int | None:
    """``auto`` -> None, ``torch`` -> 0, ``native`` -> `NATIVE_ROWS`, ``native:N`` -> N."""
    name, _, number = asked.partition(":")
    if asked == "auto":
        return None
    if asked == "torch":
        return 0
    if name == "native" and (not number or (number.isdigit() and int(number) > 0)):
        return int(number) if number else NATIVE_ROWS
    if asked == "triton":
        raise UnderstudyError("--kernel triton is of accelerators; add --device cuda")
    raise UnderstudyError(f"unknown kernel {asked!r}; use auto, torch, native or native:8")


def choose(asked: str, mlp: ExpertMlp, layout: ExpertLayout, dtype: torch.dtype) -> Choice:
    """The kernel for experts that lie as ``layout`` says, computed in ``dtype``."""
    pinned = parse(asked)
    missing = native.why_not()
    if pinned is not None:
        if pinned and missing:
            raise UnderstudyError(f"kernel {asked!r} is not here: {missing}; use --kernel torch")
        return Choice(pinned, ASKED, {})
    if missing:
        return Choice(0, f"no native kernel, torch computes: {missing}", {})
    if not mlp.could_be_native(_laid_out(layout, "meta"), dtype):
        return Choice(
            0, "torch computes: the native kernel cannot read experts that lie like these", {}
        )
    file = native.cache_folder() / "kernels" / f"choice-{_key(mlp, layout, dtype)}.json"
    return _read(file) or _measure_once(file, mlp, layout, dtype)


def _key(mlp: ExpertMlp, layout: ExpertLayout, dtype: torch.dtype) -> str:
    """Everything a measurement depends on."""
    shapes = {n: [(p.dtype, p.shape) for p in pieces] for n, pieces in layout.params.items()}
    parts = (native.identity(), torch.__version__, torch.get_num_threads(), str(dtype), mlp.swiglu,
             shapes)  # fmt: skip
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def _read(file: Path) -> Choice | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(file.read_text())
        times = {int(rows): (float(a), float(b)) for rows, (a, b) in kept["microseconds"].items()}
        return Choice(int(kept["rows"]), "measured on this machine", times)
    return None


def _measure_once(file: Path, mlp: ExpertMlp, layout: ExpertLayout, dtype: torch.dtype) -> Choice:
    """Measure, and write it down unless another process was quicker: the first answer holds."""
    try:
        with whole.first(file) as temporary:
            times = dict(_measure(mlp, layout, dtype))
            rows = _rows(times)
            kept = {"rows": rows, "microseconds": times, "dtype": str(dtype)}
            temporary.write_text(json.dumps(kept))
            if file.exists() and _read(file) is None:
                file.unlink(missing_ok=True)  # damaged
    except OSError:
        return Choice(NATIVE_ROWS, f"{file.parent} cannot be written, so not measured", {})
    return _read(file) or Choice(rows, "measured just now", times)


def _rows(times: dict[int, tuple[float, float]]) -> int:
    """Up to the first count at which torch was faster, whatever comes after it."""
    rows = 0
    for tried, (ours, theirs) in sorted(times.items()):
        if ours > theirs:
            break
        rows = tried
    return rows


def _measure(
    mlp: ExpertMlp, layout: ExpertLayout, dtype: torch.dtype
) -> Iterator[tuple[int, tuple[float, float]]]:
    """Rows -> microseconds per expert of both kernels, the best of a few alternating rounds."""
    crowd = Crowd(mlp, layout, dtype)
    kept = mlp.native_rows
    try:
        for rows in TRIED:
            best = [float("inf"), float("inf")]
            for turn in range(2 * ROUNDS):
                mlp.native_rows = 0 if turn % 2 else rows
                best[turn % 2] = min(best[turn % 2], crowd.seconds(rows))
            yield rows, (1e6 * best[0], 1e6 * best[1])
    finally:
        mlp.native_rows = kept


class Crowd:
    """Experts that lie as ``layout`` says, enough to fill ``cold_bytes`` (but ``most`` at most), to
    time a kernel on. All are copies of one of random weights."""

    def __init__(
        self, mlp: ExpertMlp, layout: ExpertLayout, dtype: torch.dtype,
        *, cold_bytes: int = COLD_BYTES, most: int = MOST,
    ) -> None:  # fmt: skip
        self.mlp, self.dtype = mlp, dtype
        first = _random(_laid_out(layout, "cpu"))
        self.expert_bytes = sum(p.nbytes for pieces in first.values() for p in pieces)
        copies = min(most - 1, cold_bytes // max(1, self.expert_bytes))
        self.experts = [first, *(_copied(first, layout) for _ in range(copies))]
        self._next = 0
        self._inputs: dict[int, torch.Tensor] = {}

    def seconds(self, rows: int) -> float:
        """Per expert, each in a call of its own, for ``rows`` tokens each."""
        batch = self._batch(rows, 1)
        started = time.perf_counter()
        for weights in self.experts:
            batch.compute(0, self.mlp, weights)
        return (time.perf_counter() - started) / len(self.experts)

    def compute(self, rows: int, together: int) -> int:
        """Compute the next ``together`` experts, as an event with ``rows`` tokens for each would.
        Answers with the bytes of their weights."""
        places = range(self._next, self._next + together)
        some = [(i, self.experts[at % len(self.experts)]) for i, at in enumerate(places)]
        self._next = places.stop % len(self.experts)
        self._batch(rows, together).compute_many(some, self.mlp)
        return together * self.expert_bytes

    def _batch(self, rows: int, experts: int) -> Batch:
        if rows not in self._inputs:
            x = torch.randn(rows, self.mlp.hidden(self.experts[0]))
            self._inputs[rows] = x.to(self.dtype)
        weights = torch.ones(rows, experts, dtype=self.dtype)
        return Batch(self._inputs[rows], [list(range(experts))] * rows, weights)


def _random(weights: Weights) -> Weights:
    for part in (part for pieces in weights.values() for part in pieces):
        if part.is_floating_point():
            part.copy_(0.02 * torch.randn(part.shape))  # float8 has no normal_ of its own
        else:
            part.random_(0, 100)
    return weights


def _copied(weights: Weights, layout: ExpertLayout) -> Weights:
    other = _laid_out(layout, "cpu")
    for name, pieces in other.items():
        for to, part in zip(pieces, weights[name], strict=True):
            to.copy_(part)
    return other


def _laid_out(layout: ExpertLayout, device: str) -> Weights:
    """Tensors that lie as ``layout`` says, with nothing in them; on "meta" they take no memory."""
    weights = Weights()
    for name, pieces in layout.params.items():
        weights[name] = tuple(
            torch.empty_strided(p.shape, p.strides, dtype=getattr(torch, p.dtype), device=device)
            for p in pieces
        )
    return weights
