"""Seats on transformers' paged cache: one packed forward for all rows, pages shared by prefixes.

Knows: transformers' continuous batching parts (pages, their ledger, the inputs of a step). Does not
know: which tokens form a step (`schedule`), sampling, experts.

Their scheduler and sampler are not used: their sampler knows temperature, top-k and top-p only,
and one scheduler of ours serves fibers too.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        pages = max(1, capacity // PAGE)
        self.capacity = pages * PAGE
        config = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=pages,
            max_batch_tokens=max_batch_tokens,
            max_requests_per_batch=max_rows,
            max_blocks_per_request=0,
            max_memory_percent=1e6,  # the plan has paid for it; this would ask the machine
            use_cuda_graph=False,
        )
        try:
            expected = _plain_logits(model)
            self._open(config)
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError) as e:
            raise Unpaged(f"{type(model).__name__}: {' '.join(str(e).split())[:200]}") from None
        try:
            self._compare(expected)
        except BaseException:
            self.close()
            raise

    def _open(self, config: ContinuousBatchingConfig) -> None:
        model, text = self.model, guest.text_config(self.model.config)
        self.cache: Any = PagedAttentionCache(
            text, config, model.device, DistributedHelper(None, None), model.dtype, True
        )
        self.prefix_sharing = bool(self.cache.use_prefix_sharing)
        none = Plain(LogitsProcessorList())
        self._inputs = ContinuousBatchingIOs(
            self.cache, text, config, model.device, model.dtype, none
        )
        self._none = none
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

    def _compare(self, expected: list[torch.Tensor]) -> None:
        """Two rows of different lengths, one in two chunks: the answers of plain forwards, rounding
        aside? A family may attend in its own way (sinks, biases, compressed keys)."""
        rows = [Row(f"rehearsal {i}", list(ids)) for i, ids in enumerate(_REHEARSAL)]
        try:
            with guest.quiet(), torch.inference_mode():
                found = self._rehearse(rows)
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as e:
            raise Unpaged(
                f"{type(self.model).__name__}: {' '.join(str(e).split())[:200]}"
            ) from None
        finally:
            for row in rows:
                self.release(row)
            self.cache.reset()
        for got, want in zip(found, expected, strict=True):
            if not bool((got - want).abs().max() <= 0.02 * want.abs().max()):
                raise Unpaged(f"{type(self.model).__name__} attends in another way")

    def _rehearse(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        for row in rows:
            self.admit(row)
            self.reserve(row, len(row.tokens))
        long, short = rows
        self.forward([Chunk(long, 7, "none")])
        first, second = self.forward(
            [Chunk(short, len(short.tokens), "last"), Chunk(long, len(long.tokens) - 7, "last")]
        )
        assert first is not None and second is not None
        return [second[0], first[0]]


_REHEARSAL = (tuple(range(3, 24)), tuple(range(40, 45)))


def _plain_logits(model: Any) -> list[torch.Tensor]:
    """Of the last position of each prompt of the rehearsal."""
    with guest.quiet(), torch.inference_mode():
        return [
            model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
            .logits[0, -1]
            .float()
            for ids in _REHEARSAL
        ]


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
    sizes = {"none": lambda c: 0, "last": lambda c: 1, "all": lambda c: c.count}
    parts: list[torch.Tensor | None] = []
    at = 0
    for chunk in chunks:
        n = sizes[chunk.logits](chunk)
        parts.append(logits[at : at + n] if n else None)
        at += n
    return parts
