"""Seats on transformers' paged cache: one packed forward for all rows, pages shared by prefixes.

Knows: transformers' continuous batching parts (pages and their ledger). Does not know: which tokens
form a step (`schedule`), where in the pages they lie (`packing`), sampling, experts.

Their scheduler and sampler are not used: their sampler knows temperature, top-k and top-p only,
and one scheduler of ours serves fibers too.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from math import lcm
from typing import Any

import torch
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import (
    PagedAttentionCache,
    group_layers_by_attn_type,
)
from transformers.generation.continuous_batching.distributed import DistributedHelper
from transformers.generation.continuous_batching.requests import RequestState

from understudy import model as guest
from understudy.batch import Chunk, Row
from understudy.batch.attention import PACKED
from understudy.batch.packing import Step
from understudy.core import UnderstudyError

PAGE = 16  # tokens; a prefix is shared in whole pages


class Unpaged(UnderstudyError):
    """transformers' paged cache does not fit this family; the text says why."""


class Paged:
    """`understudy.batch.Seats` for models whose attention is full or sliding, and nothing else."""

    whole_prompts = False

    def __init__(self, model: Any, *, capacity: int, max_rows: int, max_batch_tokens: int) -> None:
        """``capacity``: tokens of all rows together; ``max_rows``, ``max_batch_tokens``: of a step.

        Raises `Unpaged` where a short packed batch does not get the answers of plain forwards.
        """
        self.model = model
        self._plain_attention = model.config._attn_implementation
        pages = -(-capacity // PAGE)
        self.capacity = pages * PAGE
        prompts = _rehearsal(model, min(max_batch_tokens, self.capacity // 2))
        try:
            with guest.without_experts(model), guest.quiet(), torch.inference_mode():
                expected = [_plain_logits(model, ids) for ids in prompts]
                self._open(pages, max_rows, max_batch_tokens)
                rows = [Row(f"rehearsal {i}", ids) for i, ids in enumerate(prompts)]
                found = self._rehearse(rows)
        except _REFUSALS as e:
            self.close()
            raise Unpaged(f"{type(model).__name__}: {' '.join(str(e).split())[:200]}") from None
        for got, want in zip(found, expected, strict=True):
            if not bool((got - want).abs().max() <= 0.02 * want.abs().max()):
                self.close()
                raise Unpaged(f"{type(model).__name__} attends in another way")

    def _open(self, pages: int, max_rows: int, max_batch_tokens: int) -> None:
        model, text = self.model, guest.text_config(self.model.config)
        config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=pages + _lost_to_sectors(text),
            max_batch_tokens=max_batch_tokens,
            max_requests_per_batch=max(2, max_rows),  # two rehearse
            max_blocks_per_request=0,
            max_memory_percent=1e6,  # the plan has paid for it; this would ask the machine
            use_cuda_graph=False,
        )
        self.cache: Any = PagedAttentionCache(
            text, config, model.device, DistributedHelper(None, None), model.dtype, True
        )
        self.prefix_sharing = bool(self.cache.use_prefix_sharing)
        model.set_attn_implementation(PACKED)

    def close(self) -> None:
        """The model attends as it did before."""
        self.model.set_attn_implementation(self._plain_attention)

    # ------------------------------------------------------------------------------------- rows

    def admit(self, row: Row) -> int:
        row.state = state = RequestState(request_id=row.id, initial_tokens=[])
        state.initial_tokens = row.tokens  # the list itself: pages are named after what is in them
        found = self.cache.search_prefix_match(row.id, row.tokens) if row.shares_prefix else 0
        row.done = state.position_offset = found
        return int(found)

    def reserve(self, row: Row, count: int) -> bool:
        if self.cache.can_store_request_tokens(row.state, count):
            return True
        self.cache.evict_cached_blocks()  # of rows that have left, kept for their prefixes
        self.cache.pool.try_to_free_sectors()
        return bool(self.cache.can_store_request_tokens(row.state, count))

    def release(self, row: Row) -> None:
        if row.state is not None:
            self.cache.free_blocks(row.id)
            row.state, row.done = None, 0

    @property
    def used(self) -> int:
        tables = (
            set().union(*a.block_table.values()) for a in self.cache.cache_allocators.values()
        )
        return max(len(blocks) for blocks in tables) * PAGE

    # ------------------------------------------------------------------------------------- a step

    def forward(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | None]:
        complete = [self.cache.count_new_complete_blocks(c.row.state, c.count) for c in chunks]
        logits = self.model(**self._inputs(chunks)).logits[0].float()
        for chunk, blocks in zip(chunks, complete, strict=True):
            row = chunk.row
            row.done = row.state.position_offset = row.done + chunk.count
            self.cache.mark_complete_blocks(row.state, blocks)
        return _split(chunks, logits)

    def _inputs(self, chunks: Sequence[Chunk]) -> dict[str, Any]:
        device = self.model.device
        spans = [range(c.row.done, c.row.done + c.count) for c in chunks]
        tokens = [c.row.tokens[i] for c, span in zip(chunks, spans, strict=True) for i in span]
        ends = [0, *accumulate(map(len, spans))]
        return {
            "input_ids": torch.tensor([tokens], device=device),
            "position_ids": torch.tensor([[*chain(*spans)]], device=device),
            "cu_seq_lens_q": torch.tensor(ends, dtype=torch.int32),  # who reads it, reads it here
            "cache": Step(self.cache, chunks, device),
            "use_cache": False,
            "logits_to_keep": torch.tensor(_positions(chunks) or [0], device=device),
        }

    # -------------------------------------------------------------------------------- the rehearsal

    def _rehearse(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """The last logits of two rows of different lengths, one read in two chunks."""
        for row in rows:
            self.admit(row)
            self.reserve(row, len(row.tokens))
        self.forward([Chunk(rows[0], 7, "none")])
        both = [Chunk(row, len(row.tokens) - row.done, "last") for row in rows]
        found = [logits[0] for logits in self.forward(both) if logits is not None]
        for row in rows:
            self.release(row)
        self.cache.reset()
        return found


def _lost_to_sectors(text: Any) -> int:
    """Pages that the longest row may leave unused: a sector is of one kind of layers, and as large
    as the least common multiple of their numbers; all but one kind may leave one unfilled."""
    layers = [len(of_kind) for of_kind in group_layers_by_attn_type(text).values()]
    return -(-(len(layers) - 1) * lcm(*layers) // sum(layers))


# How a family shows that it keeps or computes something else than pages of keys and values.
_REFUSALS = (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError)
_LONGEST = 300  # tokens of a rehearsal: what leaves a longer window is not rehearsed


def _rehearsal(model: Any, room: int) -> tuple[list[int], list[int]]:
    """A long and a short prompt; the long one leaves the sliding window, where that is short."""
    text = guest.text_config(model.config)
    window = getattr(text, "sliding_window", None) or 0
    length = window + 8 if window + 8 <= min(room, _LONGEST) else min(room, 21)
    ids = [3 + (7 * i) % (text.vocab_size - 5) for i in range(length + 5)]
    return ids[:length], ids[length:]


def _plain_logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """[V], of the last position."""
    out = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    last: torch.Tensor = out.logits[0, -1].float()
    return last


def _positions(chunks: Sequence[Chunk]) -> list[int]:
    """Rows of the packed batch whose logits somebody wants."""
    found: list[int] = []
    end = 0
    for chunk in chunks:
        end += chunk.count
        found.extend(range(end - chunk.wanted, end))
    return found


def _split(chunks: Sequence[Chunk], logits: torch.Tensor) -> list[torch.Tensor | None]:
    parts: list[torch.Tensor | None] = []
    at = 0
    for chunk in chunks:
        parts.append(logits[at : at + chunk.wanted] if chunk.wanted else None)
        at += chunk.wanted
    return parts
