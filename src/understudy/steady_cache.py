"""The KV cache of a recorded decode step: room for the whole context, at addresses that stay.

Knows: transformers' static caches, and what in them is decided on the host. Does not know: graphs,
who records.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import (
    DummyLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionLayer,
    StaticCache,
    StaticIndexedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)


class NotCaptured(Exception):
    """This model stays eager; the text says why."""


class Window(StaticSlidingWindowLayer):  # type: ignore[misc]
    """transformers' sliding window, with a single token added by the same work whether the window
    is full or not; transformers decides that on the host."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if key_states.shape[-2] > 1:
            whole: tuple[torch.Tensor, torch.Tensor]
            whole = super().update(key_states, value_states, *args, **kwargs)
            self.cumulative_length.fill_(self.cumulative_length_int)  # not kept once it is full
            return whole
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        last = self.max_cache_len - 1
        full = (self.cumulative_length > last).long()
        order = (torch.arange(last + 1, device=self.device) + full).clamp(max=last)
        place = self.cumulative_length.clamp(max=last).view(1)
        for held, new in ((self.keys, key_states), (self.values, value_states)):
            held.copy_(held.index_select(2, order))
            held.index_copy_(2, place, new)
        self.cumulative_length.add_(1)
        self.cumulative_length_int += 1
        return self.keys, self.values

    def get_seq_length(self) -> Any:
        return self.cumulative_length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, Any]:
        if query_length > 1:
            return super().get_mask_sizes(query_length)  # type: ignore[no-any-return]
        return self.max_cache_len, (self.cumulative_length - self.max_cache_len + 1).clamp(min=0)


# Layers whose decode step is the same work at any length.
STEADY = (
    StaticLayer, Window, StaticIndexedLayer, LinearAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer, DummyLayer,
)  # fmt: skip


class Kept(StaticCache):  # type: ignore[misc]
    """Room for ``context`` tokens of one sequence at addresses that stay. ``tokens``: how many it
    holds, known without asking the device. Raises `NotCaptured` for families it cannot serve."""

    makes_masks = True  # in the forward, of lengths on the device: `generate` need not prepare any

    def __init__(self, config: Any, context: int) -> None:
        try:
            super().__init__(config=config, max_cache_len=context)
        except KeyError as e:
            raise NotCaptured(f"transformers has no static cache for layers of type {e}") from e
        for i, layer in enumerate(self.layers):
            if type(layer) is StaticSlidingWindowLayer:
                self.layers[i] = Window(layer.max_cache_len, layer.max_cache_len)
            elif type(layer) not in STEADY:
                raise NotCaptured(f"what a {type(layer).__name__} does depends on its length")
        attention = [i for i, layer in enumerate(self.layers) if isinstance(layer, StaticLayer)]
        if not attention:
            raise NotCaptured("no layer has attention")
        self._first, self.tokens = attention[0], 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        if layer_idx == self._first:
            self.tokens += key_states.shape[-2]
        whole: tuple[torch.Tensor, torch.Tensor]
        whole = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return whole

    def count(self) -> None:
        """What the host knows of a token that a graph has added."""
        self.tokens += 1
        for layer in self.layers:
            if isinstance(layer, Window):
                layer.cumulative_length_int += 1

    def reset(self) -> None:
        """Empty, in place."""
        super().reset()
        self.tokens = 0
