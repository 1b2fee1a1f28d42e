"""One step over transformers' paged cache: where keys and values of each row are put and found.

Knows: the layout of their pages. Does not know: attention, who the rows are, how pages are given
out.

transformers gathers the keys of all rows at once, in buffers that hold every page once. Rows that
share pages read more than that together, so here each row is gathered by itself, when its turn
comes: page by page, which copies faster than token by token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import torch

from understudy.batch import Chunk


class Part(NamedTuple):
    """One row of a step: ``queries`` are its lines among those of all; ``key`` and ``value``
    [K, kv heads, D] are of all positions that these may see, the newest last."""

    queries: slice
    key: torch.Tensor
    value: torch.Tensor


class Pages(Protocol):
    """The pages of one kind of attention."""

    @property
    def window(self) -> int | None:
        """Positions that a token sees, itself too; ``None``: all."""

    def parts(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> Iterator[Part]:
        """Puts the step's new keys and values [T, kv heads, D] into the pages; a part per row."""


class Step:
    """What attention is given as its ``cache``: the rows of one step, one behind the other."""

    def __init__(self, cache: Any, chunks: Sequence[Chunk], device: torch.device) -> None:
        """``cache``: transformers' `PagedAttentionCache`, with room for all of ``chunks``."""
        ends = accumulate((chunk.count for chunk in chunks), initial=0)
        queries = [slice(*pair) for pair in pairwise(ends)]
        kinds = {
            name: (_Full if getattr(pages, "sliding_window", None) is None else _Sliding)(
                pages, chunks, queries, device
            )
            for name, pages in cache.cache_allocators.items()
        }
        self._pages = {
            layer: kinds[pages.layer_type] for layer, pages in cache.layer_to_allocator.items()
        }

    def pages(self, layer: int) -> Pages:
        return self._pages[layer]


class _Full:
    """Pages that hold all positions."""

    window = None

    def __init__(
        self, pages: Any, chunks: Sequence[Chunk], queries: list[slice], device: torch.device
    ) -> None:
        self._pages, self._queries = pages, queries
        self._put = _places_of_new(pages, chunks, device)
        self._nothing = self._put[:0]
        self._lengths = [chunk.row.done + chunk.count for chunk in chunks]
        self._tables = [
            None if length == chunk.count else self._table(chunk, length).to(device)
            for chunk, length in zip(chunks, self._lengths, strict=True)
        ]

    def _table(self, chunk: Chunk, length: int) -> torch.Tensor:
        """The pages of a row's first ``length`` tokens, as layers number them."""
        size = self._pages.tokens_per_page
        blocks = self._pages.block_table[chunk.row.id][: -(-length // size)]
        stride: int = self._pages.block_physical_stride // size
        return torch.tensor(blocks) * stride

    def parts(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> Iterator[Part]:
        self._pages.update(key, value, layer, self._nothing, self._put)  # reads nothing
        views = self._pages.get_cache_for_block_table(layer)
        for queries, table, length in zip(self._queries, self._tables, self._lengths, strict=True):
            if table is None:
                yield Part(queries, key[queries], value[queries])
            else:
                yield Part(
                    queries, *(v.index_select(0, table).flatten(0, 1)[:length] for v in views)
                )


class _Sliding:
    """Rings of pages, which are never shared: old keys are read before new ones take their places,
    as transformers does it."""

    def __init__(
        self, pages: Any, chunks: Sequence[Chunk], queries: list[slice], device: torch.device
    ) -> None:
        self.window: int = pages.sliding_window
        self._pages, self._queries = pages, queries
        self._put = _places_of_new(pages, chunks, device)
        past = any(chunk.row.done for chunk in chunks)
        found = (pages.get_read_indices(c.row.id, c.row.done, c.count) for c in chunks if past)
        self._get = torch.tensor([i for one in found for i in one], dtype=torch.long, device=device)
        lengths = (pages.get_seqlen_k(chunk.row.done, chunk.count) for chunk in chunks)
        self._keys = [slice(*pair) for pair in pairwise(accumulate(lengths, initial=0))]

    def parts(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> Iterator[Part]:
        key, value = self._pages.update(key, value, layer, self._get, self._put)
        for queries, keys in zip(self._queries, self._keys, strict=True):
            yield Part(queries, key[keys], value[keys])


def _places_of_new(pages: Any, chunks: Sequence[Chunk], device: torch.device) -> torch.Tensor:
    found = (pages.get_write_indices(c.row.id, c.row.done, c.count) for c in chunks)
    return torch.tensor([i for one in found for i in one], device=device)
