"""Watches one eager decode step: what every decoder layer does around attention and experts.

Knows: transformers' attention interface, hooks. Does not know: how a layer is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from understudy.frame.operators import Site

ATTENTION = "understudy"  # our name in transformers' AttentionInterface, used while tracing only
# What makes transformers' sdpa more than softmax(q k) v; it ignores everything else.
NOT_PLAIN = ("dropout", "position_bias", "softcap", "cache", "s_aux")

_recorder: ContextVar[Recorder | None] = ContextVar("understudy_recorder", default=None)


class NotCompiled(Exception):
    """This layer stays eager; the text says why."""


class Recorder:
    """Watches one eager decode step. While ``number`` is set it is a trace: attention and experts
    become operators that are told the number of their layer."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        self.sites = [Site() for _ in layers]
        self.current = -1
        self.number: torch.Tensor | None = None
        self.function: Callable[..., Any] | None = None  # transformers' own attention
        self._routed: tuple[Any, Any] = ((), {})

    def attention(self, module: nn.Module, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
        if self.number is not None:
            return torch.ops.understudy.attend(q, k, v, self.number), None
        assert self.function is not None
        if self.current >= 0:
            site = self.sites[self.current]
            site.attention, site.attend, site.attend_kwargs = module, self.function, kwargs
            odd = any(kwargs.get(name) not in (None, 0.0) for name in NOT_PLAIN)
            site.plain = not odd and bool(kwargs.get("scaling"))
        return self.function(module, q, k, v, mask, **kwargs)

    def seam(self, layer: int, x: torch.Tensor, ids: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Stands for the experts: something that depends on the router's weights."""
        if self.number is not None:
            out: torch.Tensor = torch.ops.understudy.experts(x, ids, w, self.number)
            return out
        if self.current >= 0:
            self.sites[self.current].router_shape = self._same_input(x)
        return (x * w.sum(-1, keepdim=True)).to(x.dtype)

    def _same_input(self, x: torch.Tensor) -> tuple[int, ...] | None:
        """The shape in which the router got what the experts get; ``None`` if it got another."""
        args, kwargs = self._routed
        if len(args) != 1 or any(isinstance(v, torch.Tensor) for v in kwargs.values()):
            return None
        read = args[0]
        same = read.numel() == x.numel() and torch.equal(read.reshape(x.shape), x)
        return tuple(read.shape) if same else None

    @contextmanager
    def watching(self, routers: Sequence[nn.Module | None]) -> Iterator[None]:
        hooks = [r.register_forward_pre_hook(self._router, with_kwargs=True) for r in routers if r]
        for index, layer in enumerate(self.layers):
            hooks.append(layer.register_forward_pre_hook(self._enter(index), with_kwargs=True))
            hooks.append(layer.register_forward_hook(self._leave(index)))
        try:
            yield
        finally:
            self.current = -1
            for hook in hooks:
                hook.remove()

    def _router(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._routed = args, kwargs

    def _enter(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.current = index
            self.sites[index].args, self.sites[index].kwargs = args, dict(kwargs)

        return hook

    def _leave(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            self.sites[index].out = out

        return hook


def _interface(module: nn.Module, q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
    """What transformers finds under our name."""
    recorder = _recorder.get()
    assert recorder is not None, "our attention is asked while nothing is recorded"
    return recorder.attention(module, q, k, v, mask, **kwargs)


AttentionInterface.register(ATTENTION, _interface)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


@contextmanager
def recording(recorder: Recorder, config: Any, guests: Sequence[Any]) -> Iterator[None]:
    """While inside, this model's attention and experts ask ``recorder``. The model is ours alone
    here: nobody has been given it yet."""
    before, seams = config._attn_implementation_internal, [g.seam for g in guests]
    function = ALL_ATTENTION_FUNCTIONS.get_interface(before, None)
    if function is None or before != "sdpa":
        raise NotCompiled(f"attention {before!r} is not transformers' sdpa")
    recorder.function = function
    token = _recorder.set(recorder)
    config._attn_implementation_internal = ATTENTION
    for guest in guests:
        guest.seam = recorder.seam
    try:
        yield
    finally:
        config._attn_implementation_internal = before
        for guest, seam in zip(guests, seams, strict=True):
            guest.seam = seam
        _recorder.reset(token)
