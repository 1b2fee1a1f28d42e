"""Puts the parts together: a checkpoint and a budget become a model that runs.

Knows: every room below, and how they are wired; nobody else does. Does not know: prompts, tokens,
terminals, HTTP.

    load(source, memory)   checkpoint -> skeleton -> layouts -> plan -> guest + runtime -> model
    inspect(source)        the same as far as it goes without reading weights
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from understudy import dense, formats, frame
from understudy import model as guest
from understudy import plan as planning
from understudy.checkpoint import Checkpoint, ExpertsModule
from understudy.core import (
    STORED,
    ContextTooLong,
    Counters,
    ExpertId,
    ExpertLayout,
    LayerEvent,
    UnderstudyError,
)
from understudy.experts import foresight, kernels
from understudy.experts.compute import ExpertMlp
from understudy.experts.lookahead import Lookahead
from understudy.experts.runtime import Runtime
from understudy.experts.store import Store, slot_bytes
from understudy.experts.transfer import StoreSource, TransferQueue
from understudy.policies import Predictor, RouteTransform
from understudy.policies.director import Director
from understudy.policies.predict import SelfSwitch
from understudy.policies.residency import Residency
from understudy.profile import Profile
from understudy.registry import EVICTORS, PREDICTORS, RESOLVERS, ROUTES, require

DEFAULT_CONTEXT = 4096
# The first compiling takes seconds and some hundred MiB that no budget knows of: not for small
# models. Counted in parameters, so that packing a model does not change its frame.
COMPILE_PARAMETERS = 500_000_000
PROBE_BYTES = 64 << 20  # read once at the start, to say what speed to expect

Dtype = str | torch.dtype


@dataclass(frozen=True, slots=True)
class Options:
    """Everything a user can choose about a load. The defaults are the recommendation."""

    memory: str | int = "auto"
    max_context: int | None = None
    dtype: Dtype = "auto"
    evictor: str = "lrfu"
    predictor: str = "next-gate"
    depth: int = 1
    io_threads: int = 4
    frame: str = "auto"  # compiled or eager decoder layers; auto: see `COMPILE_PARAMETERS`
    kernel: str = "auto"  # which kernel computes few tokens: auto, torch, native, native:N
    prefill_chunk_size: int | None = 512  # None: the whole prompt in one forward
    direct_io: bool = True
    # Instead of as many as fit; benchmarks compare equal caches. "50%" of all experts; "2k": two
    # layers' worth of one token's experts, k being how many a token uses.
    slots: int | str | None = None
    self_switch: bool = True  # speculation switches itself off while it loses
    route: str = "as-routed"  # who runs; everything else but as-routed is lossy
    resolver: str = "fetch"  # what is done about a miss
    profile: str | Path | None = None  # what was learned offline (`understudy profile`)
    seed: int = 0  # of the policies that draw

    def __post_init__(self) -> None:
        kernels.parse(self.kernel)
        if self.frame not in ("auto", "compiled", "eager"):
            raise UnderstudyError(f"unknown frame {self.frame!r}; use auto, compiled or eager")
        for name in ("depth", "io_threads", "prefill_chunk_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UnderstudyError(f"{name} must be at least 1, not {value}")


# ----------------------------------------------------------------------------- what a model is


@dataclass(frozen=True)
class Anatomy:
    """A checkpoint taken apart without reading its weights."""

    checkpoint: Checkpoint
    bones: Any
    modules: Sequence[ExpertsModule]
    layouts: dict[ExpertId, ExpertLayout]

    @classmethod
    def of(cls, source: str | Path) -> Anatomy:
        checkpoint = Checkpoint.open(source)
        bones = guest.skeleton(checkpoint.config)
        modules = guest.find_experts(bones)
        return cls(checkpoint, bones, modules, checkpoint.layouts(bones, modules))

    @property
    def name(self) -> str:
        return self.checkpoint.path.name

    @property
    def lossy(self) -> bool:
        """Whether the experts are in a format that has lost something."""
        return not formats.is_exact(self.checkpoint.format)

    @property
    def delta_nll(self) -> float | None:
        """Nats per token that the format was measured to cost; ``None``: nothing, or unmeasured."""
        manifest = self.checkpoint.manifest
        quality = manifest.quality if manifest is not None else None
        return float(quality["delta_nll"]) if quality else None

    def format_in_words(self) -> str:
        """For the plan: what the experts are in, where that is not plain numbers."""
        name = self.checkpoint.format
        if name == STORED:
            return ""
        if not self.lossy:
            return f"experts in {name}, as stored"
        delta = self.delta_nll
        known = "unmeasured" if delta is None else f"delta NLL {delta:+.4f} per token when packed"
        return f"experts in {name}: LOSSY, {known}"

    @property
    def expert_bytes(self) -> int:
        """Bytes of the largest expert."""
        return max(layout.nbytes for layout in self.layouts.values())

    def dtype(self, asked: Dtype) -> torch.dtype:
        """The dtype of the computation; ``auto`` is the one the checkpoint names."""
        if isinstance(asked, torch.dtype):
            return asked
        if asked != "auto":
            found = getattr(torch, _DTYPES.get(asked, asked), None)
            if not isinstance(found, torch.dtype) or not found.is_floating_point:
                raise UnderstudyError(f"unknown dtype {asked!r}; use auto, bfloat16 or float32")
            return found
        config = self.checkpoint.config
        found = getattr(config, "dtype", None) or getattr(guest.text_config(config), "dtype", None)
        return found if isinstance(found, torch.dtype) else torch.float32

    def dense_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of everything that stays resident, in ``dtype``: stored tensors, and buffers that
        the model computes for itself (rotary)."""
        stored = self.checkpoint.dense_bytes(self.bones, self.modules)
        floats = sum(n // _FLOATS[kind] * dtype.itemsize for kind, n in stored.items()
                     if kind in _FLOATS)  # fmt: skip
        others = sum(n for kind, n in stored.items() if kind not in _FLOATS)
        known = self.bones.state_dict()
        made: int = sum(b.nbytes for name, b in self.bones.named_buffers() if name not in known)
        return floats + others + made

    def unpacked_dense(self, dtype: torch.dtype) -> dict[str, torch.Tensor] | None:
        """The dense weights, where transformers could not read them as they are stored."""
        parts = self.checkpoint, self.bones, self.modules
        return dense.weights(*parts, dtype) if dense.is_quantised(*parts) else None

    def context(self, asked: int | None) -> int:
        """Tokens to plan for: what was asked, else the smaller of the model's and 4096."""
        longest = guest.longest_context(self.checkpoint.config)
        if asked is None:
            return min(longest or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
        if asked < 1 or (longest is not None and asked > longest):
            raise ContextTooLong(
                f"--max-context {asked} is not possible: {self.name} was made for 1 to {longest} "
                "tokens; ask for less"
            )
        return asked


_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "f32": "float32"}
_FLOATS = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}  # what is cast, and its bytes as stored


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect` reports. Bytes are stored bytes; budgets are for the default context."""

    family: str
    architecture: str
    layers: int
    moe_layers: int
    experts_per_layer: int
    top_k: int
    experts: int
    expert_bytes: int
    slot_bytes: int
    dense_bytes: int
    checkpoint_bytes: int
    context: int
    smallest_memory: int
    recommended_memory: int
    format: str
    lossy: bool
    delta_nll: float | None


def inspect(source: str | Path, *, max_context: int | None = None) -> Inspection:
    """Take a checkpoint apart and price it; reads headers only."""
    a = Anatomy.of(source)
    config, text = a.checkpoint.config, guest.text_config(a.checkpoint.config)
    context = a.context(max_context)
    dtype = a.dtype("auto")
    slot = slot_bytes(a.layouts)
    fixed = (
        a.dense_bytes(dtype)
        + guest.kv_cache_estimate(config, context, dtype.itemsize)
        + _activations(a, Options(), context, dtype)
    )
    top_k = guest.experts_per_token(config)
    per_layer = max(m.num_experts for m in a.modules)
    return Inspection(
        family=config.model_type,
        architecture=type(a.bones).__name__,
        layers=int(getattr(text, "num_hidden_layers", len(a.modules))),
        moe_layers=len(a.modules),
        experts_per_layer=per_layer,
        top_k=top_k,
        experts=len(a.layouts),
        expert_bytes=a.expert_bytes,
        slot_bytes=slot,
        dense_bytes=a.dense_bytes(dtype),
        checkpoint_bytes=a.checkpoint.nbytes,
        context=context,
        smallest_memory=fixed + planning.MINIMUM_SLOTS * slot,
        recommended_memory=planning.recommended_bytes(
            fixed, slot, len(a.layouts), len(a.modules), top_k
        ),
        format=a.checkpoint.format,
        lossy=a.lossy,
        delta_nll=a.delta_nll,
    )


def _activations(a: Anatomy, options: Options, context: int, dtype: torch.dtype) -> int:
    """Working memory of one prefill chunk: the residual stream and its copies, the rows gathered
    for experts and their outputs per rank, and one expert's intermediate rows."""
    text = guest.text_config(a.checkpoint.config)
    hidden = int(getattr(text, "hidden_size", 0) or 0)
    k = max(1, guest.experts_per_token(a.checkpoint.config))
    width = max(max(shape[1:]) for m in a.modules for shape in m.params.values())
    per_token = (12 + 2 * k) * hidden + 3 * width
    tokens = min(options.prefill_chunk_size or context, context)
    return tokens * per_token * max(4, dtype.itemsize) + _unpacking(a, dtype)


def _unpacking(a: Anatomy, dtype: torch.dtype) -> int:
    """Working memory in which the largest matrix of a quantised expert is unpacked: its numbers
    in ``dtype``, and twice in the precision they are worked out in."""
    if a.checkpoint.format == STORED:
        return 0
    largest = max(prod(s[1:]) for m in a.modules for s in m.params.values())
    return largest * (dtype.itemsize + 2 * formats.wide_enough(dtype).itemsize)


# ----------------------------------------------------------------------------------- loading


class Handle:
    """``model.understudy``: what the engine shows of itself, and `close`."""

    def __init__(
        self,
        runtime: Runtime,
        plan: planning.Plan,
        options: Options,
        anatomy: Anatomy,
        choices: Sequence[kernels.Choice],
        built: frame.Frame | None,
    ) -> None:
        self.frame = built
        self.runtime, self.plan, self.options, self.anatomy = runtime, plan, options, anatomy
        self.kernels = tuple(dict.fromkeys(choice.name for choice in choices))
        self.closed = False

    @property
    def counters(self) -> Counters:
        """Everything counted since the load; subtract two snapshots."""
        return self.runtime.counters

    @property
    def policies(self) -> dict[str, Any]:
        """Names of the policies, whether speculation is on now, what look-ahead cannot see, what
        was given up on this model or disk (chunked prefill, direct I/O), and the weight format."""
        o, look = self.options, self.runtime.lookahead
        return {
            "evictor": o.evictor,
            "predictor": o.predictor,
            "depth": o.depth,
            "route": o.route,
            "resolver": o.resolver,
            "kernel": ",".join(self.kernels),
            "frame": "eager" if self.frame is None else f"{self.frame.compiled} layers compiled",
            "speculating": self.runtime.director.switch.on,
            "lookahead_unavailable": {**look.unforeseen, **look.unavailable},
            "direct_io": self.runtime.store.disk.direct,
            "prefill_chunk_size": o.prefill_chunk_size,
            "format": self.anatomy.checkpoint.format,
            "lossy": self.anatomy.lossy,
        }

    @property
    def bandwidth(self) -> float:
        """Bytes per second the link has achieved while busy."""
        return self.runtime.transfer.meter.bandwidth

    def start_recording(self) -> None:
        self.runtime.recording = []

    def stop_recording(self) -> list[LayerEvent]:
        events, self.runtime.recording = self.runtime.recording or [], None
        return events

    def close(self) -> None:
        """Stop the workers, close the files, give the slots back. Harmless when repeated."""
        if not self.closed:
            self.closed = True
            self.runtime.close()


def load(
    source: str | Path | Anatomy,
    memory: str | int = "auto",
    *,
    on_status: Any = None,
    **options: Any,
) -> Any:
    """Load a Mixture-of-Experts checkpoint inside a memory budget.

    ``source``: a local folder, a hub id, or a checkpoint taken apart already. ``memory``: "8GiB",
    "50%" of the checkpoint, "auto", or bytes; it covers dense weights, expert slots, KV cache and
    working memory. Further options are those of `Options`. Returns a genuine `PreTrainedModel`
    (also a context manager) that carries ``model.understudy``. Raises `UnderstudyError` and its
    children, one line each.
    """
    asked = chosen = Options(memory=memory, **options)
    say = on_status or (lambda line: None)
    require(chosen.evictor, chosen.predictor, chosen.route, chosen.resolver)
    anatomy = source if isinstance(source, Anatomy) else Anatomy.of(source)
    dtype = anatomy.dtype(chosen.dtype)
    total = planning.parse_memory(chosen.memory, anatomy.checkpoint.nbytes)
    context = anatomy.context(chosen.max_context)
    estimate = guest.kv_cache_estimate(anatomy.checkpoint.config, context, dtype.itemsize)
    _fit(anatomy, chosen, total, anatomy.dense_bytes(dtype), estimate, context, dtype)
    model = guest.load_guest(
        anatomy.checkpoint.path,
        anatomy.checkpoint.config,
        anatomy.bones,
        dtype,
        anatomy.unpacked_dense(dtype),
    )
    minds = _Minds.of(anatomy, chosen, model)
    kv = guest.kv_cache_bytes(model, context)
    if asked.prefill_chunk_size is not None and not guest.chunks_prefill(model):
        chosen = replace(chosen, prefill_chunk_size=None)
    learned = 0 if minds.foresight is None else minds.foresight.nbytes
    plan = _fit(anatomy, chosen, total, _resident_bytes(model) + learned, kv, context, dtype)
    plan = _expect(plan, anatomy, chosen)
    say(plan.line())
    runtime, choices = _assemble(anatomy, chosen, plan, model, minds)
    built = None if minds.needs_residual else _frame(anatomy, chosen, model, runtime, say)
    guest.attach(model, runtime, anatomy.modules, residuals=minds.needs_residual)
    model.understudy = Handle(runtime, plan, chosen, anatomy, choices, built)
    for note in (*_given_up(asked, chosen, runtime), *_slower(choices)):
        say(note)
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.prefill_chunk_size = chosen.prefill_chunk_size
    return model


def _frame(a: Anatomy, o: Options, model: Any, runtime: Runtime, say: Any) -> frame.Frame | None:
    """Compile the decoder layers, where that was asked for or pays; ``None``: all eager."""
    small = _expert_parameters(a) < COMPILE_PARAMETERS
    if o.frame == "eager" or (o.frame == "auto" and small):
        return None
    products = _products(runtime.mlps)
    config, guests = guest.text_config(model.config), guest.guests(model)
    routers = guest.routers(model, a.modules)
    built = frame.compile_frame(model, config, guests, routers, products, say)
    for reason in built.eager:
        say(f"note: eager, not compiled: {reason}")
    for reason in built.called:
        say(f"note: compiled, but its calls are not repeated by C: {reason}")
    return built


def _expert_parameters(a: Anatomy) -> int:
    return sum(prod(shape) for module in a.modules for shape in module.params.values())


def _products(mlps: Sequence[ExpertMlp]) -> Any:
    """The native products of one row, where the native kernel is in use."""
    native = any(mlp.native_rows for mlp in mlps)
    return torch.ops.understudy.products.default if native else None


def _given_up(asked: Options, o: Options, runtime: Runtime) -> Iterator[str]:
    """What was asked for (or is the default) and cannot be had here: no silent fallback."""
    if o.prefill_chunk_size != asked.prefill_chunk_size:
        yield "note: prompts are read whole; chunks fail or change the answer in this family"
    if o.direct_io and not runtime.store.disk.direct:
        yield "note: this file system refuses direct I/O; reads go through the page cache"
    unseen = runtime.lookahead.unavailable
    if runtime.director.predictor.lookahead and unseen:
        layer, reason = next(iter(unseen.items()))
        yield f"note: {len(unseen)} layers cannot be looked ahead (layer {layer}: {reason})"


def _slower(choices: Sequence[kernels.Choice]) -> Iterator[str]:
    """Why few tokens are computed by torch, where that was neither asked for nor measured."""
    reasons = {c.why for c in choices if c.microseconds == {} and c.why != kernels.ASKED}
    yield from (f"note: {reason}" for reason in sorted(reasons))


def _resident_bytes(model: Any) -> int:
    """Parameters and buffers, tied ones once."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def _fit(
    a: Anatomy, o: Options, total: int, dense: int, kv: int, context: int, dtype: torch.dtype
) -> planning.Plan:
    return planning.fit(
        total,
        dense=dense,
        kv=kv,
        activations=_activations(a, o, context, dtype),
        slot_bytes=slot_bytes(a.layouts),
        experts=len(a.layouts),
        context=context,
        expert_bytes=a.expert_bytes,
        predictors=_predictor(a, o).nbytes,
        slots=_slots(a, o),
        name=a.name,
        format_in_words=a.format_in_words(),
    )


def _slots(a: Anatomy, o: Options) -> int | None:
    if not isinstance(o.slots, str):
        return o.slots
    k = guest.experts_per_token(a.checkpoint.config)
    times = {"%": len(a.layouts) / 100, "k": k}.get(o.slots[-1:], 1)
    try:
        slots = int(float(o.slots.rstrip("%k")) * times)
    except ValueError:
        slots = 0
    if slots < 1:
        raise UnderstudyError(
            f"--slots {o.slots!r} means nothing here; use a number, 50% of all experts, or 2k for "
            f"{2 * k}"
        )
    return max(planning.MINIMUM_SLOTS, slots)


def _expect(plan: planning.Plan, a: Anatomy, o: Options) -> planning.Plan:
    """Write the expected speed on the plan, from one short read of the first file."""
    largest = max(a.checkpoint.files, key=lambda f: f.stat().st_size)
    bandwidth = planning.disk_bandwidth(
        largest, o.io_threads, 2 << 20, PROBE_BYTES, direct=o.direct_io
    )
    top_k = guest.experts_per_token(a.checkpoint.config)
    if not bandwidth or not top_k:
        return plan
    return plan.expecting(
        planning.expected_tokens_per_second(plan, len(a.modules), top_k, bandwidth)
    )


def _predictor(a: Anatomy, o: Options) -> Predictor:
    experts = [m.num_experts for m in a.modules]
    found: Predictor = PREDICTORS.make(
        o.predictor, layers=len(experts), experts=experts, depth=o.depth
    )
    return found


def fingerprint(a: Anatomy, model: Any) -> str:
    """Of what a profile depends on: the routers, and the shapes of the experts."""
    digest = hashlib.sha256(repr([(m.num_experts, dict(m.params)) for m in a.modules]).encode())
    for router in guest.routers(model, a.modules):
        for tensor in () if router is None else (*router.parameters(), *router.buffers()):
            digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class _Minds:
    """Who decides beside evictor and predictor, and what was learned for them."""

    route: RouteTransform
    foresight: foresight.Foresight | None

    @property
    def needs_residual(self) -> bool:
        return self.foresight is not None and self.foresight.needs_residual

    @classmethod
    def of(cls, a: Anatomy, o: Options, model: Any) -> _Minds:
        profile = None if o.profile is None else Profile.load(o.profile, fingerprint(a, model))
        experts = [m.num_experts for m in a.modules]
        route: RouteTransform = ROUTES.make(
            o.route, layers=len(experts), experts=experts, learned=profile, seed=o.seed
        )
        predictor = _predictor(a, o)
        kind = predictor.foresight
        if kind not in ("router-input", "drift") and profile is None:
            raise UnderstudyError(
                f"predictor {o.predictor} needs a profile of this model: make one with "
                "`understudy profile` and pass it as --profile"
            )
        if route.wants_foretold and not predictor.lookahead:
            raise UnderstudyError(
                f"route {o.route} needs a predictor that looks ahead; add --predictor next-gate"
            )
        if route.wants_scores and None in guest.routers(model, a.modules):
            raise UnderstudyError(
                f"route {o.route} needs the router's scores, and {a.name} has layers without a "
                "router beside the experts; use --route as-routed"
            )
        shared = guest.shared_experts(model, a.modules)
        if kind == "shared" and not any(shared):
            raise UnderstudyError(
                f"predictor {o.predictor}: {a.name} has no shared experts; use quasi-gate"
            )
        seen = foresight.make(kind, profile, shared)
        if seen is not None and seen.needs_residual and o.frame == "compiled":
            raise UnderstudyError(
                f"predictor {o.predictor} reads the residual stream, which compiled layers do not "
                "show; use --frame eager"
            )
        return cls(route, seen)


def _assemble(
    a: Anatomy, o: Options, plan: planning.Plan, model: Any, minds: _Minds
) -> tuple[Runtime, list[kernels.Choice]]:
    """Wire minds and hands: the one place that knows them all."""
    lock = threading.RLock()
    book = Residency(plan.slots)
    store = Store(a.checkpoint.files, a.layouts, plan.slots, direct=o.direct_io)
    speculate = o.predictor != "none" and plan.slots < plan.experts
    director = Director(
        book,
        evictor=EVICTORS.make(o.evictor, slots=plan.slots, layers=len(a.modules)),
        predictor=_predictor(a, o),
        resolver=RESOLVERS.make(o.resolver),
        route=minds.route,
        switch=SelfSwitch(enabled=speculate, adaptive=o.self_switch),
        nbytes=store.nbytes,
        ample=plan.slots >= plan.experts,
    )
    transfer = TransferQueue(
        book,
        StoreSource(store),
        lock=lock,
        place=director.place,
        forget=director.forget,
        wanted=director.wanted,
        threads=o.io_threads,
    )
    mlps, choices = _mlps(a, o, model)
    return Runtime(
        director=director,
        store=store,
        transfer=transfer,
        lock=lock,
        mlps=mlps,
        lookahead=Lookahead(guest.routers(model, a.modules), _products(mlps), minds.foresight),
    ), choices


def _mlps(a: Anatomy, o: Options, model: Any) -> tuple[list[ExpertMlp], list[kernels.Choice]]:
    """One per MoE layer, each with the kernel that its layout asks for."""
    mlps = [ExpertMlp(module, a.checkpoint.format) for module in guest.guests(model)]
    choices = []
    for layer, mlp in enumerate(mlps):
        layout = next(found for expert, found in a.layouts.items() if expert.layer == layer)
        choice = kernels.choose(o.kernel, mlp, layout, model.dtype)
        mlp.native_rows = choice.rows
        choices.append(choice)
    return mlps, choices
