"""The two operators that a compiled layer cannot see into: attention and experts.

Knows: transformers' caches and attention functions, the seam, attention of one token in C. Does not
know: how a layer is traced, compiled or repeated.

They call the cache and the attention function of transformers, and the seam. So any cache, any mask
and any attention works, and nothing in the compiled code depends on how long the text is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import DynamicLayer

from understudy import native
from understudy.core import current_forward
from understudy.frame.program import Answer, Memory, Opaque, View

ROOM = 256  # tokens by which the KV cache grows
_operators: Any = torch.library.Library("understudy", "FRAGMENT")  # type: ignore[no-untyped-call]
_operators.define("attend(Tensor q, Tensor k, Tensor v, Tensor layer) -> Tensor")
_operators.define("experts(Tensor x, Tensor ids, Tensor weights, Tensor layer) -> Tensor")


@dataclass(slots=True)
class Site:
    """What one decoder layer did in the recorded eager step.

    ``attention``, ``attend``, ``attend_kwargs``: its module, transformers' function, and what that
    was called with beside q, k, v and mask; ``plain``: nothing but softmax. ``experts``: its
    Experts module, if it has one, whose router reads what the experts read, in ``router_shape``.
    ``args``: of the layer's forward.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    out: torch.Tensor | None = None
    attention: nn.Module | None = None
    attend: Callable[..., Any] | None = None
    attend_kwargs: dict[str, Any] = field(default_factory=dict)
    plain: bool = False
    experts: Any = None
    router_shape: tuple[int, ...] | None = None


@dataclass(slots=True)
class Call:
    """One layer under way: what its opaque operators need and the compiled code never sees."""

    index: int
    site: Site
    cache: Any
    mask: Any


call_under_way: ContextVar[Call] = ContextVar("understudy_layer_call")


# ----------------------------------------------------------------------------- the KV cache


def _growing(call: Call) -> Any:
    """The layer's part of transformers' growing cache, once it holds a prompt; ``None``: the cache
    is another one, or empty."""
    layers = getattr(call.cache, "layers", ())
    layer: Any = layers[call.index] if call.index < len(layers) else None
    if type(layer) is DynamicLayer and layer.is_initialized and layer.keys.numel():
        return layer
    return None


def _room(held: torch.Tensor) -> torch.Tensor:
    """[B, h, n, d] -> the same at the front of [B, h, more than n, d]. transformers' growing cache
    copies all it holds for every token; here it grows by `ROOM` tokens at a time, and its tensors
    are views of what it has."""
    n = held.shape[2]
    whole: torch.Tensor | None = getattr(held, "understudy_room", None)
    if whole is None or whole.shape[2] == n or whole.data_ptr() != held.data_ptr():
        whole = held.new_empty(*held.shape[:2], n + ROOM, held.shape[3])
        whole[:, :, :n] = held
    return whole


def _front(whole: torch.Tensor, n: int) -> torch.Tensor:
    """Its first ``n`` tokens, which remember that there is more."""
    held: Any = whole[:, :, :n]
    held.understudy_room = whole
    return held  # type: ignore[no-any-return]


def _grown(held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """[B, h, n, d] and [B, h, 1, d] -> [B, h, n + 1, d], in place if there is room behind."""
    n = held.shape[2]
    whole = _room(held)
    whole[:, :, n : n + 1] = new
    return _front(whole, n + 1)


# ----------------------------------------------------------------------------- attention


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: Call) -> torch.Tensor:
    site, layer = call.site, _growing(call)
    assert site.attend is not None
    if layer is None:
        keys, values = call.cache.update(k, v, call.index)
    else:
        keys = layer.keys = _grown(layer.keys, k)
        values = layer.values = _grown(layer.values, v)
    if site.plain:
        return _attend_by_groups(q, keys, values, call.mask, site.attend_kwargs["scaling"])
    out: torch.Tensor = site.attend(
        site.attention, q, keys, values, call.mask, **site.attend_kwargs
    )[0]
    return out.contiguous()


def _attend_by_groups(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scale: float
) -> torch.Tensor:
    """The query heads that share a key head as rows of one product: the same bits as one head at a
    time, and keys and values are read once (5 times faster at 500 tokens, 2 groups of 2)."""
    batch, heads, _, width = q.shape
    grouped = q.reshape(batch, k.shape[1], heads // k.shape[1], width)
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, scale=scale)
    return out.reshape(batch, 1, heads, -1)


class Attend:
    """The operator in a `Program`: in C where it is softmax over a cache that grows."""

    def __init__(self, step: Opaque) -> None:
        self._reads = step.reads
        q, k, v = step.reads
        self._fits = all(_is_one_token(view) for view in step.reads) and k.shape == v.shape
        self._shape = native.Attention(q.shape[1], k.shape[1], q.shape[3])
        self._shape.bf16 = q.dtype == "bfloat16"
        self._strides = (ctypes.c_int64 * 3)(*[view.strides[1] for view in step.reads])
        self._out = (1, 1, q.shape[1], q.shape[3])
        self._dtype = getattr(torch, q.dtype)
        lib = native.library()
        assert lib is not None
        self._in_c = lib.understudy_attend

    def __call__(self, memory: Memory, call: Call) -> torch.Tensor:
        layer = _growing(call) if self._fits and call.site.plain and call.mask is None else None
        if layer is None or layer.keys.shape[0] != 1 or layer.keys.dtype != self._dtype:
            q, k, v = map(memory.tensor, self._reads)
            return _attend(q, k, v, call)
        n = layer.keys.shape[2]
        keys, values = _room(layer.keys), _room(layer.values)
        out = torch.empty(self._out, dtype=self._dtype)
        shape = native.Attention.from_buffer_copy(self._shape)
        shape.tokens, shape.room = n + 1, keys.shape[2]
        shape.scale = call.site.attend_kwargs["scaling"]
        places = [memory.address + view.spot.offset for view in self._reads]
        failed = self._in_c(
            ctypes.addressof(shape), *places, self._strides, keys.data_ptr(), values.data_ptr(),
            out.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("no memory for the scores of attention")
        layer.keys, layer.values = _front(keys, n + 1), _front(values, n + 1)
        return out


def _is_one_token(view: View) -> bool:
    """[1, heads, 1, width], each head in one piece, as the C code reads it."""
    batch, _, tokens, width = view.shape
    known = view.dtype in ("bfloat16", "float32")
    return known and batch == tokens == 1 and view.strides[3] == 1 and width % 16 == 0


# ----------------------------------------------------------------------------- experts


def _experts(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, call: Call) -> torch.Tensor:
    site, forward, module = call.site, current_forward.get(), call.site.experts
    if forward is not None:
        assert site.router_shape is not None
        forward.router_args = {module.moe_layer: ((x.view(site.router_shape),), {})}
    out: torch.Tensor = module.seam(module.moe_layer, x, ids, weights)
    return out


class Experts:
    """The operator in a `Program`."""

    def __init__(self, step: Opaque) -> None:
        self._reads = step.reads

    def __call__(self, memory: Memory, call: Call) -> torch.Tensor:
        x, ids, weights = map(memory.tensor, self._reads)
        return _experts(x, ids, weights, call).contiguous()


OPAQUE: dict[str, Callable[[Opaque], Answer]] = {"attend": Attend, "experts": Experts}


# ----------------------------------------------------------------------------- as torch sees them


def _attend_shape(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: torch.Tensor) -> Any:
    batch, heads, tokens, _ = q.shape
    return q.new_empty(batch, tokens, heads, v.shape[-1])


def _experts_shape(x: torch.Tensor, ids: Any, weights: Any, layer: Any) -> torch.Tensor:
    return torch.empty_like(x)


_operators.impl("attend", lambda q, k, v, layer: _attend(q, k, v, call_under_way.get()), "CPU")
_operators.impl("experts", lambda x, i, w, layer: _experts(x, i, w, call_under_way.get()), "CPU")
_operators.impl("attend", _attend_shape, "Meta")
_operators.impl("experts", _experts_shape, "Meta")
