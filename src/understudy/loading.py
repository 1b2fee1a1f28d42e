"""A checkpoint and a budget become a model that runs.

Knows: in which order things are found out, paid for and put together. Does not know: what a
checkpoint is (`anatomy`), how parts are wired (`assembly`), prompts, tokens, terminals, HTTP.

    load(source, memory)   checkpoint -> skeleton -> layouts -> plan -> guest + runtime -> model
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from understudy import frame
from understudy import model as guest
from understudy import plan as planning
from understudy.anatomy import Anatomy, Inspection, Options, activations, inspect, slots_asked
from understudy.assembly import Minds, compiled_frame, make_predictor, on_host
from understudy.core import Counters, LayerEvent
from understudy.experts import kernels
from understudy.experts.runtime import Runtime
from understudy.experts.store import Store, slot_bytes
from understudy.registry import require

__all__ = ["Anatomy", "Handle", "Inspection", "Options", "inspect", "load"]

PROBE_BYTES = 64 << 20  # read once at the start, to say what speed to expect


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
        store: Store,
    ) -> None:
        self.frame, self.store = built, store
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
            "direct_io": self.store.disk.direct,
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
    source: str | Path, memory: str | int = "auto", *, on_status: Any = None, **options: Any
) -> Any:
    """Load a Mixture-of-Experts checkpoint inside a memory budget.

    ``source``: a local folder or a hub id. ``memory``: "8GiB", "50%" of the checkpoint, "auto", or
    bytes; it covers dense weights, expert slots, KV cache and working memory. Further options are
    those of `Options`. Returns a genuine `PreTrainedModel` (also a context manager) that carries
    ``model.understudy``. Raises `UnderstudyError` and its children, one line each.
    """
    asked = chosen = Options(memory=memory, **options)
    say = on_status or (lambda line: None)
    require(chosen.evictor, chosen.predictor, chosen.route, chosen.resolver)
    anatomy = Anatomy.of(source)
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
    minds = Minds.of(anatomy, chosen, model)
    kv = guest.kv_cache_bytes(model, context)
    if asked.prefill_chunk_size is not None and not guest.chunks_prefill(model):
        chosen = replace(chosen, prefill_chunk_size=None)
    learned = 0 if minds.foresight is None else minds.foresight.nbytes
    plan = _fit(anatomy, chosen, total, _resident_bytes(model) + learned, kv, context, dtype)
    plan = _expect(plan, anatomy, chosen)
    say(plan.line())
    runtime, choices, store = on_host(anatomy, chosen, plan, model, minds)
    built = None if minds.needs_residual else compiled_frame(anatomy, chosen, model, choices, say)
    guest.attach(model, runtime, anatomy.modules, residuals=minds.needs_residual)
    model.understudy = Handle(runtime, plan, chosen, anatomy, choices, built, store)
    for note in (*_given_up(asked, chosen, runtime, store), *_slower(choices)):
        say(note)
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.prefill_chunk_size = chosen.prefill_chunk_size
    return model


def _given_up(asked: Options, o: Options, runtime: Runtime, store: Store) -> Iterator[str]:
    """What was asked for (or is the default) and cannot be had here: no silent fallback."""
    if o.prefill_chunk_size != asked.prefill_chunk_size:
        yield "note: prompts are read whole; chunks fail or change the answer in this family"
    if o.direct_io and not store.disk.direct:
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
        activations=activations(a, o, context, dtype),
        slot_bytes=slot_bytes(a.layouts),
        experts=len(a.layouts),
        context=context,
        expert_bytes=a.expert_bytes,
        predictors=make_predictor(a, o).nbytes,
        slots=slots_asked(a, o),
        name=a.name,
        format_in_words=a.format_in_words(),
    )


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
