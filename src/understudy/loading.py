"""A checkpoint and a budget become a model that runs.

Knows: in which order things are found out, paid for and put together. Does not know: what a
checkpoint is (`anatomy`), how parts are wired (`assembly`), prompts, tokens, terminals, HTTP.

    load(source, memory)   checkpoint -> skeleton -> layouts -> plan -> guest + runtime -> model
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from understudy import model as guest
from understudy import plan as planning
from understudy.anatomy import (
    Anatomy,
    Inspection,
    Options,
    activations,
    inspect,
    slots_asked,
    vocabulary,
)
from understudy.assembly import Built, Minds, OnHost, make_predictor
from understudy.core import Counters, LayerEvent
from understudy.registry import require, require_no_device

if TYPE_CHECKING:
    from understudy.on_device import OnDevice

__all__ = ["Anatomy", "Handle", "Inspection", "Options", "inspect", "load"]


class Handle:
    """``model.understudy``: what the engine shows of itself, and `close`."""

    def __init__(self, built: Built, options: Options, anatomy: Anatomy) -> None:
        self.built, self.runtime, self.plan = built, built.runtime, built.plan
        self.options, self.anatomy = options, anatomy
        self.closed = False

    @property
    def counters(self) -> Counters:
        """Everything counted since the load; subtract two snapshots."""
        return self.built.counters

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
            **self.built.facts,
            **({} if self.built.others is None else {"decode": self.built.others.now}),
            "speculating": self.runtime.director.switch.on,
            "lookahead_unavailable": {**look.unforeseen, **look.unavailable},
            "direct_io": self.built.store.disk.direct,
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
    place = place_of(anatomy, chosen)
    context = anatomy.context(chosen.max_context)
    estimate = guest.kv_cache_estimate(anatomy.checkpoint.config, context, dtype.itemsize)
    guessed = guest.KvCost(0, estimate / context)
    _fit(place, chosen, anatomy.dense_bytes(dtype), guessed, context, dtype)
    model = guest.load_guest(
        anatomy.checkpoint.path,
        anatomy.checkpoint.config,
        anatomy.bones,
        dtype,
        anatomy.unpacked_dense(dtype),
    )
    minds = Minds.of(anatomy, chosen, model)
    kv = guest.kv_cost(model)
    if asked.prefill_chunk_size is not None and not guest.chunks_prefill(model):
        chosen = replace(chosen, prefill_chunk_size=None)
    learned = 0 if minds.foresight is None else minds.foresight.nbytes
    plan = _fit(place, chosen, _resident_bytes(model) + learned, kv, context, dtype)
    plan = place.expect(plan)
    say(plan.line())
    built = place.build(plan, model, minds, say)
    guest.attach(model, built.runtime, anatomy.modules, residuals=minds.needs_residual)
    model.understudy = Handle(built, chosen, anatomy)
    place.finish(model, built, minds)
    for note in (*_given_up(asked, chosen, built), *built.notes):
        say(note)
    if getattr(model, "generation_config", None) is not None and model.can_generate():
        model.generation_config.prefill_chunk_size = chosen.prefill_chunk_size
    return model


def place_of(a: Anatomy, o: Options) -> OnHost | OnDevice:
    """Where experts will be computed. Raises where that is not here."""
    if o.device == "cpu":
        require_no_device(o.resolver)
        return OnHost(a, o)
    from understudy.on_device import OnDevice

    return OnDevice(a, o)


def _given_up(asked: Options, o: Options, built: Built) -> Iterator[str]:
    """What was asked for (or is the default) and cannot be had here: no silent fallback."""
    if o.prefill_chunk_size != asked.prefill_chunk_size:
        yield "note: prompts are read whole; chunks fail or change the answer in this family"
    if o.direct_io and not built.store.disk.direct:
        yield "note: this file system refuses direct I/O; reads go through the page cache"
    runtime = built.runtime
    unseen = runtime.lookahead.unavailable
    if runtime.director.predictor.lookahead and unseen:
        layer, reason = next(iter(unseen.items()))
        yield f"note: {len(unseen)} layers cannot be looked ahead (layer {layer}: {reason})"


def _resident_bytes(model: Any) -> int:
    """Parameters and buffers, tied ones once."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def _fit(
    place: OnHost | OnDevice,
    o: Options,
    dense: int,
    cost: guest.KvCost,
    context: int,
    dtype: torch.dtype,
) -> planning.Plan:
    a, total = place.a, place.budget()
    scored = planning.scored_positions(total, vocabulary(a), o.sequences)
    working, one = activations(a, o, context, dtype, scored), cost.of(context)
    left = total - dense - working
    kv = planning.kv_budget(o.kv_memory, one, o.sequences, left, a.checkpoint.nbytes)
    plan = planning.fit(
        total,
        dense=dense,
        kv=kv,
        activations=working + _gathered(a, o, kv),
        slot_bytes=place.slot_bytes,
        experts=len(a.layouts),
        context=context,
        expert_bytes=a.expert_bytes,
        predictors=make_predictor(a, o).nbytes,
        slots=slots_asked(a, o),
        name=a.name,
        option=place.memory_option,
        format_in_words=a.format_in_words(),
    )
    tokens = context * kv // one if one else context * o.sequences
    return replace(
        plan,
        kv_tokens=tokens,
        kv_row_tokens=cost.rows_in_tokens(context),
        scored_positions=scored,
    )


def _gathered(a: Anatomy, o: Options, kv: int) -> int:
    """Keys and values of one layer that attention reads out of their pages, and holds twice for a
    moment: of one sequence at a time, or of all of them, where they slide."""
    layers = int(getattr(guest.text_config(a.checkpoint.config), "num_hidden_layers", 0) or 1)
    return 2 * kv // layers if o.sequences > 1 else 0
