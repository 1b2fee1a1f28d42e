"""Seats on transformers' ordinary caches: every row runs as a fiber that waits at its experts.

Knows: a model's forward and its own cache. Does not know: how fibers share an experts call
(`parking`), which tokens form a step (`schedule`), what a family's attention does.

Every family with the experts interface can be batched so, whatever its cache is: rows share their
experts and nothing else. What is tried at the start is whether it answers token by token, and
whether its prompts can be read in chunks.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, compress, count
from operator import ne
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import DynamicLayer

from understudy import model as guest
from understudy.batch import Chunk, Row
from understudy.batch.parking import Fiber, Hub, Parking
from understudy.core import Forward, UnderstudyError, current_forward
from understudy.frame import calls_from_torch

KEPT = 32  # rows that have left and whose beginnings may be used again, at most


class Unbatchable(UnderstudyError):
    """The rows of this model cannot be run as fibers; the text says why."""


class LostRow(UnderstudyError):
    """A step of this row has failed halfway, and its cache with it."""


# ------------------------------------------------------------------------------------------ seats


@dataclass(eq=False, slots=True)
class _Seat:
    """What a row has. ``room``: tokens reserved, done ones included. ``donor``: the cache whose
    first tokens this row begins with, until they are copied."""

    cache: Any = None
    room: int = 0
    donor: Any = None
    lost: bool = False


class _Kept(NamedTuple):
    """The cache of a row that has left."""

    tokens: list[int]
    cache: Any


class Fibers:
    """`understudy.batch.Seats` on ordinary caches.

    ``apart``: MoE layers that could not be looked ahead for several rows at once, and why.

    A step that fails, for whatever reason, leaves the caches of its rows at different layers: they
    must be released, and a later step with one of them raises `LostRow`. Other rows are as before.
    """

    def __init__(self, model: Any, *, capacity: int, row_tokens: int = 0, kept: int = KEPT) -> None:
        """``capacity``: tokens of all rows together, as the plan of ``model`` counts them: one of
        its ``context`` tokens takes one, ``row_tokens`` of these whatever their number. A sliding
        window takes less in the end, but never more. ``kept``: so many rows that have left are
        kept for their beginnings, as long as nobody needs the room. Raises `Unbatchable`."""
        if calls_from_torch(model):
            raise Unbatchable(
                "the compiled layers of this model cannot be left at their experts; "
                "load it with frame='eager'"
            )
        self.model, self.capacity = model, capacity
        self._row_tokens = row_tokens
        self._context: int = model.understudy.plan.context
        self._most_kept = kept
        self._rows: dict[Row, _Seat] = {}
        self._left: list[_Kept] = []  # least recently used first
        self._takes = inspect.signature(model.forward).parameters.keys()
        self.apart: dict[int, str] = {}
        found = _Rehearsal(self)
        self.whole_prompts = found.whole_prompts
        self.prefix_sharing = found.divisible and not found.whole_prompts
        self._guests = guest.guests(model)
        self._seams = [module.seam for module in self._guests]
        for module in self._guests:
            module.seam = Parking(module.seam)

    def close(self) -> None:
        """The model asks its experts as it did before. Harmless when repeated."""
        for module, seam in zip(self._guests, self._seams, strict=True):
            module.seam = seam
        self._left.clear()

    # ------------------------------------------------------------------------------------- rows

    def admit(self, row: Row) -> int:
        seat = row.state = self._rows[row] = _Seat()
        row.done = 0
        if self.prefix_sharing and row.shares_prefix:
            donor, found = self._longest_prefix(row.tokens)
            if found and self.reserve(row, found):
                seat.donor, row.done = donor, found
                return found
        return 0

    def reserve(self, row: Row, count: int) -> bool:
        seat = self._seat(row)
        room = max(seat.room, row.done + count)
        if self.used - self._cost(seat.room) + self._cost(room) > self.capacity:
            return False
        seat.room = room
        self._keep_within(self.capacity - self.used)
        return True

    def release(self, row: Row) -> None:
        seat = self._rows.pop(row, None)
        if seat is None:
            return
        whole = seat.cache is not None and not seat.lost
        if whole and self.prefix_sharing and row.shares_prefix:
            self._keep(_Kept(row.tokens[: row.done], seat.cache))
        row.state, row.done = None, 0

    @property
    def used(self) -> int:
        return sum(self._cost(seat.room) for seat in self._rows.values())

    def _cost(self, tokens: int) -> int:
        """Of one row. A row as long as the plan's context costs just that."""
        if not tokens:
            return 0
        return self._row_tokens + tokens - tokens * self._row_tokens // self._context

    def _seat(self, row: Row) -> _Seat:
        seat = self._rows[row]
        if seat.lost:
            raise LostRow(f"{row.id}: a step of it has failed, its cache is lost; start it again")
        return seat

    # --------------------------------------------------------------------------------- prefixes

    def _longest_prefix(self, tokens: Sequence[int]) -> tuple[Any, int]:
        """Whose cache begins as ``tokens`` do, and how far; one token at least is left to do."""
        best: tuple[Any, int] = (None, 0)
        for row, seat in self._rows.items():
            if seat.cache is not None and not seat.lost:
                found = min(_common(row.tokens, tokens), row.done)
                best = max(best, (seat.cache, found), key=_reach)
        for kept in self._left:
            best = max(best, (kept.cache, _common(kept.tokens, tokens)), key=_reach)
        self._left.sort(key=lambda kept: kept.cache is best[0])  # stable: just used, so last
        return best[0], min(best[1], len(tokens) - 1)

    def _keep(self, new: _Kept) -> None:
        """It stands for those that are beginnings of it."""
        self._left = [k for k in self._left if _common(k.tokens, new.tokens) < len(k.tokens)]
        self._left.append(new)
        del self._left[: max(0, len(self._left) - self._most_kept)]
        self._keep_within(self.capacity - self.used)

    def _keep_within(self, tokens: int) -> None:
        """Let go of those that were not used for the longest time."""
        sizes = [len(kept.tokens) for kept in reversed(self._left)]
        fitting = sum(total <= tokens for total in accumulate(sizes))
        del self._left[: len(self._left) - fitting]

    # ------------------------------------------------------------------------------------- a step

    def forward(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | None]:
        if not chunks:
            return []
        seats = [self._seat(chunk.row) for chunk in chunks]
        for chunk, seat in zip(chunks, seats, strict=True):
            assert chunk.row.done + chunk.count <= seat.room, "no room was reserved"
        try:
            with torch.inference_mode(), self._announced(chunks) as step:
                fibers = [
                    Fiber(i, Forward(step.step, step.phase), self._work(chunk, seat))
                    for i, (chunk, seat) in enumerate(zip(chunks, seats, strict=True))
                ]
                Hub(self._seams, self.apart).run(fibers)
        except BaseException:
            for seat in seats:
                seat.cache, seat.donor, seat.lost = None, None, True
            raise
        for chunk in chunks:
            chunk.row.done += chunk.count
        return [fiber.result for fiber in fibers]

    @contextmanager
    def _announced(self, chunks: Sequence[Chunk]) -> Iterator[Forward]:
        """The seam is told of one forward: the packed one that this step stands for."""
        ends = [0, *accumulate(chunk.count for chunk in chunks)]
        packed = {
            "input_ids": torch.empty(1, ends[-1], dtype=torch.long),
            "cu_seq_lens_q": torch.tensor(ends),
        }
        with self.model._announce((), packed):
            step = current_forward.get()
            assert step is not None
            yield step

    def _work(self, chunk: Chunk, seat: _Seat) -> Callable[[], torch.Tensor | None]:
        """What the fiber of ``chunk`` does."""
        row = chunk.row
        tokens = row.tokens[row.done : row.done + chunk.count]
        wanted = chunk.wanted

        def work() -> torch.Tensor | None:
            if seat.donor is not None:
                seat.cache, seat.donor = self._copied(seat.donor, row.done), None
            elif seat.cache is None:
                seat.cache = self._empty_cache()
            logits, seat.cache = self._advance(tokens, row.done, seat.cache, max(1, wanted))
            return logits if wanted else None

        return work

    def _advance(
        self, tokens: Sequence[int], done: int, cache: Any, wanted: int
    ) -> tuple[torch.Tensor, Any]:
        """The model's forward over the next tokens of one sequence, announced to nobody: logits of
        the last ``wanted`` positions, and the cache."""
        device = self.model.device
        inputs: dict[str, Any] = {
            "input_ids": torch.tensor([tokens], device=device),
            "past_key_values": cache,
            "use_cache": True,
        }
        if "position_ids" in self._takes:  # else some remember where another sequence was
            places = torch.arange(done, done + len(tokens), device=device)
            inputs["position_ids"] = places.unsqueeze(0)
        if "logits_to_keep" in self._takes:
            inputs["logits_to_keep"] = wanted
        out = self.model._run((), inputs)
        return out.logits[0, -wanted:].float(), out.past_key_values

    def _empty_cache(self) -> Any:
        """As `generate` makes it; ``None``: the model makes its own."""
        if self.model._supports_default_dynamic_cache():
            return DynamicCache(config=guest.text_config(self.model.config))
        return None

    def _copied(self, donor: Any, tokens: int) -> Any:
        """A cache that begins as ``donor`` does, with memory of its own."""
        cache = self._empty_cache()
        for index, layer in enumerate(donor.layers):
            if layer.is_initialized:
                cache.update(layer.keys[:, :, :tokens], layer.values[:, :, :tokens], index)
        return cache


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next(compress(count(), map(ne, a, b)), min(len(a), len(b)))


def _reach(found: tuple[Any, int]) -> int:
    return found[1]


# -------------------------------------------------------------------------------------- rehearsal


class _Rehearsal:
    """What a model's cache can do, tried on a short prompt without experts, which take long.

    ``whole_prompts``: tokens that come after others must come one by one; state-space layers
    silently lose their state else. ``divisible``: the beginning of a cache is a cache.
    """

    PROMPT = tuple(range(1, 13))

    def __init__(self, fibers: Fibers) -> None:
        self._fibers = fibers
        name = type(fibers.model).__name__
        if not (isinstance(fibers.model, GenerationMixin) and fibers.model.can_generate()):
            raise Unbatchable(f"{name} does not answer token by token; it cannot be served")
        with guest.without_experts(fibers.model), guest.quiet(), torch.inference_mode():
            try:
                whole, cache = self._last_logits(12)
                stepwise, _ = self._last_logits(11, 1)
            except (TypeError, ValueError, RuntimeError, AttributeError, IndexError) as e:
                reason = " ".join(str(e).split())[:160]
                raise Unbatchable(f"{name} does not answer token by token: {reason}") from None
            if not _alike(whole, stepwise):
                raise Unbatchable(f"{name} answers differently after its own cache")
            self.whole_prompts = not self._reads_chunks(whole)
        self.divisible = type(cache) is DynamicCache and all(
            type(layer) is DynamicLayer for layer in cache.layers
        )

    def _reads_chunks(self, whole: torch.Tensor) -> bool:
        try:
            return _alike(whole, self._last_logits(5, 5, 2)[0])
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            return False

    def _last_logits(self, *chunks: int) -> tuple[torch.Tensor, Any]:
        done, cache, logits = 0, self._fibers._empty_cache(), torch.empty(0)
        for length in chunks:
            tokens = self.PROMPT[done : done + length]
            logits, cache = self._fibers._advance(tokens, done, cache, 1)
            done += length
        return logits, cache


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Rounding aside: what is lost changes logits by the order of their size."""
    return a.shape == b.shape and bool((a - b).abs().max() <= 0.05 * a.abs().max())
