"""The frame compiled: what a decoder layer does around attention and experts, as one call.

Knows: transformers' decoder layers, attention interface and caches, make_fx and inductor. Does not
know: experts, budgets, policies. Decode steps of one sequence only; everything else runs eager.

A layer of one token is some seventy small operations; in eager mode their dispatch costs more than
their arithmetic. So the layer is traced once with its parameters as inputs, compiled, and called
for every layer that looks the same:

    norm, q, k, v, rotary -> [attend] -> o, norm, router -> [experts] -> residual

The two brackets are opaque operators: they call the cache and the attention function of
transformers, and the seam. So any cache, any mask and any attention works, and nothing in the
compiled code depends on how long the text is. inductor keeps its code on disk
(TORCHINDUCTOR_CACHE_DIR): a second start reads it.

Compiled code rounds less often than eager code, so the frame is part of what fixes the bits: it is
decided at load, by the model and the machine alone, and is the same for every budget. Each layer is
compared with eager mode before it is used; a layer that cannot be traced, or answers differently,
stays eager, and `Frame.eager` says why.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._functorch.compile_utils import fx_graph_cse
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from understudy.core import current_forward

ATTENTION = "understudy"  # our name in transformers' AttentionInterface, used while tracing only
TOLERANCE = 0.03  # of the largest number; bf16 code that rounds elsewhere stays well under it
ROOM = 256  # tokens by which the KV cache grows
# What makes transformers' sdpa more than softmax(q k) v; it ignores everything else.
NOT_PLAIN = ("dropout", "position_bias", "softcap", "cache", "s_aux")
PROMPT = 4  # tokens before the step that is recorded

_operators: Any = torch.library.Library("understudy", "FRAGMENT")  # type: ignore[no-untyped-call]
_operators.define("attend(Tensor q, Tensor k, Tensor v, Tensor layer) -> Tensor")
_operators.define("experts(Tensor x, Tensor ids, Tensor weights, Tensor layer) -> Tensor")


class NotCompiled(Exception):
    """This layer stays eager; the text says why."""


@dataclass(slots=True)
class _Site:
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
class _Call:
    """One layer under way: what its opaque operators need and the compiled code never sees."""

    index: int
    site: _Site
    cache: Any
    mask: Any


_call: ContextVar[_Call] = ContextVar("understudy_layer_call")
_recorder: ContextVar[_Recorder | None] = ContextVar("understudy_recorder", default=None)


# ----------------------------------------------------------------------------- opaque operators


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: torch.Tensor) -> torch.Tensor:
    call = _call.get()
    site = call.site
    assert site.attend is not None
    keys, values = _append(call.cache, call.index, k, v)
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


def _append(
    cache: Any, index: int, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """``cache.update`` for one token. transformers' growing cache copies all it holds for every
    token; here it grows by `ROOM` tokens at a time, and its tensors are views of what it has."""
    layer: Any = cache.layers[index] if index < len(getattr(cache, "layers", ())) else None
    if type(layer) is not DynamicLayer or not layer.is_initialized or not layer.keys.numel():
        keys, values = cache.update(k, v, index)
        return keys, values
    layer.keys, layer.values = _grown(layer.keys, k), _grown(layer.values, v)
    return layer.keys, layer.values


def _grown(held: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """[B, h, n, d] and [B, h, 1, d] -> [B, h, n + 1, d], in place if there is room behind."""
    n = held.shape[2]
    whole = getattr(held, "understudy_room", None)
    if whole is None or whole.shape[2] == n or whole.data_ptr() != held.data_ptr():
        whole = held.new_empty(*held.shape[:2], n + ROOM, held.shape[3])
        whole[:, :, :n] = held
    whole[:, :, n : n + 1] = new
    grown: Any = whole[:, :, : n + 1]
    grown.understudy_room = whole
    return grown  # type: ignore[no-any-return]


def _experts(
    x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, layer: torch.Tensor
) -> torch.Tensor:
    site = _call.get().site
    forward, module = current_forward.get(), site.experts
    if forward is not None:
        assert site.router_shape is not None
        forward.router_args = {module.moe_layer: ((x.view(site.router_shape),), {})}
    out: torch.Tensor = module.seam(module.moe_layer, x, ids, weights)
    return out


def _attend_shape(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: torch.Tensor) -> Any:
    batch, heads, tokens, _ = q.shape
    return q.new_empty(batch, tokens, heads, v.shape[-1])


def _experts_shape(x: torch.Tensor, ids: Any, weights: Any, layer: Any) -> torch.Tensor:
    return torch.empty_like(x)


_operators.impl("attend", _attend, "CPU")
_operators.impl("experts", _experts, "CPU")
_operators.impl("attend", _attend_shape, "Meta")
_operators.impl("experts", _experts_shape, "Meta")


# ---------------------------------------------------------------------------- recording a step


class _Recorder:
    """Watches one eager decode step. While ``number`` is set it is a trace: attention and experts
    become operators that are told the number of their layer."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        self.sites = [_Site() for _ in layers]
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
def _recording(recorder: _Recorder, config: Any, guests: Sequence[Any]) -> Iterator[None]:
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


# ------------------------------------------------------------------------------------- tracing


class _Through:
    """Stands for the cache in a trace: keys and values go on to `attend`, which updates it."""

    def update(self, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return k, v


@dataclass(frozen=True, slots=True)
class _Inputs:
    """Where the tensors of a layer call are: (name of the argument, place in a tuple or None);
    name "" is the first positional one. ``constants`` were what they were when it was traced."""

    tensors: tuple[tuple[str, int | None], ...]
    constants: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, site: _Site) -> _Inputs:
        if len(site.args) != 1:
            raise NotCompiled(f"a layer with {len(site.args)} positional arguments")
        tensors: list[tuple[str, int | None]] = [("", None)]
        constants = []
        for name, value in site.kwargs.items():
            if name in ("past_key_values", "attention_mask"):
                continue
            if isinstance(value, torch.Tensor):
                tensors.append((name, None))
            elif isinstance(value, tuple) and all(isinstance(v, torch.Tensor) for v in value):
                tensors += [(name, i) for i in range(len(value))]
            elif value is None or isinstance(value, bool | int | float | str):
                constants.append((name, value))
            else:
                raise NotCompiled(f"a layer argument {name} of type {type(value).__name__}")
        return cls(tuple(tensors), tuple(constants))

    def gather(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        return [
            args[0] if not name else kwargs[name] if place is None else kwargs[name][place]
            for name, place in self.tensors
        ]

    def scatter(self, tensors: Sequence[torch.Tensor], kwargs: Mapping[str, Any]) -> Any:
        """The keyword arguments with these tensors in them."""
        filled = dict(kwargs)
        for (name, place), tensor in zip(self.tensors[1:], tensors[1:], strict=True):
            if place is None:
                filled[name] = tensor
            else:
                filled[name] = (*filled[name][:place], tensor, *filled[name][place + 1 :])
        return filled


def _state(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(layer.named_parameters()), **dict(layer.named_buffers())}


def _trace(layer: nn.Module, site: _Site, inputs: _Inputs, recorder: _Recorder) -> Any:
    """The layer as a graph of (number, tensors..., parameters...)."""
    names = list(_state(layer))
    count = len(inputs.tensors)

    def run(number: torch.Tensor, *flat: torch.Tensor) -> tuple[torch.Tensor]:
        recorder.number = number
        kwargs = inputs.scatter(flat[:count], site.kwargs)
        kwargs |= {"past_key_values": _Through(), "attention_mask": None}
        state = dict(zip(names, flat[count:], strict=True))
        out = torch.func.functional_call(layer, state, (flat[0],), kwargs)
        if not isinstance(out, torch.Tensor):
            raise NotCompiled("a layer that answers with more than a tensor")
        return (out,)

    try:
        flat = (*inputs.gather(site.args, site.kwargs), *_state(layer).values())
        return make_fx(run, tracing_mode="fake")(torch.tensor(0), *flat)
    finally:
        recorder.number = None


def _multiply_with(products: Any, graph: Any) -> None:
    """Let ``products`` (x [1, K], weights) -> [1, all lines] multiply one row by whole parameters,
    those that read the same row in one call."""
    aten = torch.ops.aten
    graph.graph = fx_graph_cse(graph.graph)  # every product looks at the input through its own view
    found: dict[Any, list[Any]] = {}
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.target is aten.mm.default:
            x, w = node.args
            turned = w.op == "call_function" and w.target is aten.t.default
            if turned and w.args[0].op == "placeholder" and x.meta["val"].shape[0] == 1:
                found.setdefault(x, []).append(node)
    for x, nodes in found.items():
        with graph.graph.inserting_before(nodes[0]):
            weights = [node.args[1].args[0] for node in nodes]
            together, start = graph.graph.call_function(products, (x, weights)), 0
            for node, weight in zip(nodes, weights, strict=True):
                end = start + weight.meta["val"].shape[0]
                part = graph.graph.call_function(aten.slice.Tensor, (together, 1, start, end))
                node.replace_all_uses_with(part)
                start = end
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _compile(graph: Any, example: Sequence[torch.Tensor]) -> Callable[..., Any]:
    import torch._inductor.config as inductor
    from torch._inductor.compile_fx import compile_fx

    # One process: a pool of compilers would outlive the load and count against the budget. One
    # thread: what is left between the products is too small to be shared.
    with inductor.patch({"compile_threads": 1, "size_asserts": False, "cpp.threads": 1}):
        compiled: Any = compile_fx(graph, list(example))
        return compiled  # type: ignore[no-any-return]


# ------------------------------------------------------------------------------- the compiled one


class CompiledLayer:
    """Stands before a decoder layer's ``forward``: one token of one sequence runs compiled."""

    def __init__(
        self, layer: nn.Module, index: int, site: _Site, inputs: _Inputs, code: Callable[..., Any]
    ) -> None:
        self.eager = layer.forward
        self.index, self.site, self.inputs, self.code = index, site, inputs, code
        self.state = list(_state(layer).values())
        self.number = torch.tensor(index)
        self.shape, self.dtype = site.args[0].shape, site.args[0].dtype

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        hidden, cache = args[0], kwargs.get("past_key_values")
        if hidden.shape != self.shape or cache is None or torch.is_grad_enabled():
            return self.eager(*args, **kwargs)  # type: ignore[no-any-return]
        if any(kwargs.get(name) != value for name, value in self.inputs.constants):
            return self.eager(*args, **kwargs)  # type: ignore[no-any-return]
        return self.run(args, kwargs, cache)

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], cache: Any) -> torch.Tensor:
        token = _call.set(_Call(self.index, self.site, cache, kwargs.get("attention_mask")))
        try:
            flat = self.inputs.gather(args, kwargs)
            (out,) = self.code(self.number, *flat, *self.state)
            return out  # type: ignore[no-any-return]
        finally:
            _call.reset(token)


@dataclass(frozen=True)
class Frame:
    """``compiled``: how many decoder layers run compiled; ``eager``: why the others do not."""

    compiled: int
    eager: tuple[str, ...]


def compile_frame(
    model: Any,
    config: Any,
    guests: Sequence[Any],
    routers: Sequence[nn.Module | None],
    products: Any = None,
) -> Frame:
    """Replace the forward of every decoder layer that allows it. ``config``: of the text model.
    ``products``: an operator for products of one row, where there is a better one than torch's."""
    try:
        layers = _decoder_layers(model, guests)
        with torch.no_grad():
            frame = _compile_layers(model, config, layers, guests, routers, products)
        _replace_head(model, products)
        return frame
    except NotCompiled as e:
        return Frame(0, (str(e),))


class _Head:
    """The output embeddings, for one token: the largest dense matrix of most models."""

    def __init__(self, head: nn.Linear, products: Any) -> None:
        self.eager, self.weight, self.products = head.forward, head.weight, products

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel() != x.shape[-1] or x.dtype != self.weight.dtype or torch.is_grad_enabled():
            return self.eager(x)
        out: torch.Tensor = self.products(x.view(1, -1), [self.weight])
        return out.view(*x.shape[:-1], -1)


def _replace_head(model: Any, products: Any) -> None:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if products is not None and type(head) is nn.Linear and head.bias is None:
        head.forward = _Head(head, products)  # type: ignore[method-assign]


def _decoder_layers(model: nn.Module, guests: Sequence[Any]) -> list[nn.Module]:
    names = {id(m): n for n, m in model.named_modules()}
    found = {names[id(g)].partition(".layers.")[0] + ".layers" for g in guests}
    if len(found) != 1:
        raise NotCompiled("experts in more than one stack of layers")
    try:
        layers: Any = model.get_submodule(found.pop())
        return list(layers)
    except AttributeError:
        raise NotCompiled("no list of decoder layers") from None


def _compile_layers(
    model: Any,
    config: Any,
    layers: Sequence[nn.Module],
    guests: Sequence[Any],
    routers: Sequence[nn.Module | None],
    products: Any,
) -> Frame:
    recorder = _Recorder(layers)
    with _recording(recorder, config, guests):
        before = _record(model, recorder, routers)
        codes: dict[Any, Any] = {}
        good, reasons = [], []
        for index, (layer, site) in enumerate(zip(layers, recorder.sites, strict=True)):
            try:
                inputs, code = _code(layer, site, recorder, codes, guests, products)
                compiled = CompiledLayer(layer, index, site, inputs, code)
                _verify(compiled, before)
                good.append((layer, compiled))
            except NotCompiled as e:
                reasons.append(f"layer {index}: {e}")
    for layer, compiled in good:
        compiled.site.args, compiled.site.kwargs, compiled.site.out = (), {}, None
        layer.forward = compiled
    return Frame(len(good), tuple(reasons))


def _record(model: Any, recorder: _Recorder, routers: Sequence[nn.Module | None]) -> Any:
    """Run a prompt, then one token that is watched. Returns the cache as it was before it."""
    try:
        ids = torch.arange(1, PROMPT + 1).unsqueeze(0)
        cache = model(input_ids=ids, use_cache=True).past_key_values
        before = copy.deepcopy(cache)
        with recorder.watching(routers):
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
        return before
    except (TypeError, ValueError, RuntimeError, AttributeError) as e:
        raise NotCompiled(f"one token cannot be run by itself: {_line(e)}") from e


def _code(
    layer: nn.Module,
    site: _Site,
    recorder: _Recorder,
    codes: dict[Any, Any],
    guests: Sequence[Any],
    products: Any,
) -> tuple[_Inputs, Callable[..., Any]]:
    """Compiled code for ``layer``: that of an earlier one which looks the same, or new."""
    if site.attention is None or not site.args or not isinstance(site.out, torch.Tensor):
        raise NotCompiled("it does not call transformers' attention, or answers with a tuple")
    site.experts = next((m for m in layer.modules() if m in guests), None)
    if site.experts is not None and site.router_shape is None:
        raise NotCompiled("its router reads something else than its experts")
    inputs = _Inputs.of(site)
    shapes = [(n, t.shape, t.dtype) for n, t in _state(layer).items()]
    key = (type(layer), inputs, tuple(shapes))
    if key not in codes:
        example = (*inputs.gather(site.args, site.kwargs), *_state(layer).values())
        try:
            graph = _trace(layer, site, inputs, recorder)
            if products is not None:
                _multiply_with(products, graph)
            codes[key] = _compile(graph, (torch.tensor(0), *example))
        except NotCompiled:
            raise
        except Exception as e:  # whatever a tracer and two compilers may raise
            raise NotCompiled(f"it cannot be compiled: {_line(e)}") from e
    return inputs, codes[key]


def _verify(compiled: CompiledLayer, before: Any) -> None:
    """The recorded step again, compiled: same numbers but for rounding?"""
    site = compiled.site
    try:
        out = compiled.run(site.args, site.kwargs, copy.deepcopy(before))
    except Exception as e:
        raise NotCompiled(f"its compiled code fails: {_line(e)}") from e
    assert site.out is not None and out.shape == site.out.shape
    error = (out.float() - site.out.float()).abs().max()
    if not error <= TOLERANCE * site.out.float().abs().max():
        raise NotCompiled("its compiled code answers differently")


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:160]
