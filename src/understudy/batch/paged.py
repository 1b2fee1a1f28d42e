"""Seats on transformers' paged cache: one packed forward for all rows, pages shared by prefixes.

Knows: transformers' continuous batching parts (pages, their ledger, the inputs of a step). Does not
know: which tokens form a step (`schedule`), sampling, experts.

Their scheduler and sampler are not used: their sampler knows temperature, top-k and top-p only,
and one scheduler of ours serves fibers too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.distributed import DistributedHelper
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState

from understudy import model as guest
from understudy.batch import Chunk, Row
from understudy.batch.attention import PACKED, Span, spans
from understudy.core import UnderstudyError

PAGE = 16  # tokens; a prefix is shared in whole pages

Plain = ContinuousBatchingLogitsProcessorList


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
        config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=pages,
            max_batch_tokens=max_batch_tokens,
            max_requests_per_batch=max(2, max_rows),  # two rehearse
            max_blocks_per_request=0,
            max_memory_percent=1e6,  # the plan has paid for it; this would ask the machine
            use_cuda_graph=False,
        )
        prompts = _rehearsal(model, min(max_batch_tokens, self.capacity // 2))
        try:
            with guest.without_experts(model), guest.quiet(), torch.inference_mode():
                expected = [_plain_logits(model, ids) for ids in prompts]
                self._open(config)
                rows = [Row(f"rehearsal {i}", ids) for i, ids in enumerate(prompts)]
                found = self._rehearse(rows)
        except _REFUSALS as e:
            self.close()
            raise Unpaged(f"{type(model).__name__}: {' '.join(str(e).split())[:200]}") from None
        for got, want in zip(found, expected, strict=True):
            if not bool((got - want).abs().max() <= 0.02 * want.abs().max()):
                self.close()
                raise Unpaged(f"{type(model).__name__} attends in another way")

    def _open(self, config: ContinuousBatchingConfig) -> None:
        model, text = self.model, guest.text_config(self.model.config)
        self.cache: Any = PagedAttentionCache(
            text, config, model.device, DistributedHelper(None, None), model.dtype, True
        )
        self.prefix_sharing = bool(self.cache.use_prefix_sharing)
        model.set_attn_implementation(PACKED)  # first: others have a mask over all pages laid out
        self._none = Plain(LogitsProcessorList())
        self._inputs = ContinuousBatchingIOs(
            self.cache, text, config, model.device, model.dtype, self._none
        )

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
        return [logits for part in self._parts(chunks) for logits in self._forward(part)]

    def _parts(self, chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
        """All in one, but for rows that share so many pages that they have more keys together than
        the cache has: those are copied out of their pages for attention, and the budget pays for a
        copy of the whole cache, not of more."""
        part: list[Chunk] = []
        keys = 0
        for chunk in chunks:
            more = chunk.row.done + chunk.count
            if part and keys + more > self.capacity:
                yield part
                part, keys = [], 0
            part.append(chunk)
            keys += more
        if part:
            yield part

    def _forward(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | None]:
        futures = [self._future(chunk) for chunk in chunks]
        past = sum(chunk.row.done for chunk in chunks)
        total = sum(chunk.count for chunk in chunks)
        self.cache.spans = self._spans(chunks)
        self._inputs.prepare_batch_tensors(futures, self._none, False, total, past, False)
        wanted = _positions(chunks)
        inputs: dict[str, Any] = {**self._inputs.get_model_kwargs()}
        del inputs["logits_indices"], inputs["logits_processor_args"]
        keep = torch.tensor(wanted or [0], device=self.model.device)
        logits = self.model(**inputs, logits_to_keep=keep).logits[0].float()
        for chunk, future in zip(chunks, futures, strict=True):
            chunk.row.done += chunk.count
            self.cache.mark_complete_blocks(chunk.row.state, future.complete_blocks)
        return _split(chunks, logits)

    def _future(self, chunk: Chunk) -> FutureRequestState:
        row = chunk.row
        row.state.tokens_to_process = row.tokens[row.done : row.done + chunk.count]
        complete = self.cache.count_new_complete_blocks(row.state, chunk.count)
        return FutureRequestState(row.state, False, complete, chunk.count)

    def _spans(self, chunks: Sequence[Chunk]) -> dict[str, list[Span]]:
        queries = [chunk.count for chunk in chunks]
        return {
            kind: spans(queries, [a.get_seqlen_k(c.row.done, c.count) for c in chunks])
            for kind, a in self.cache.cache_allocators.items()
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
        start, end = end, end + chunk.count
        first = {"none": end, "last": end - 1, "all": start}[chunk.logits]
        found.extend(range(first, end))
    return found


def _split(chunks: Sequence[Chunk], logits: torch.Tensor) -> list[torch.Tensor | None]:
    parts: list[torch.Tensor | None] = []
    at = 0
    for chunk in chunks:
        n = {"none": 0, "last": 1, "all": chunk.count}[chunk.logits]
        parts.append(logits[at : at + n] if n else None)
        at += n
    return parts
