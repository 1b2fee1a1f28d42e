"""Wires minds and hands for one loaded model. What a device needs beside that is in `on_device`.

Knows: every room below. Does not know: budgets and how they are divided (`plan`), prompts, HTTP.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from understudy import frame
from understudy import model as guest
from understudy import plan as planning
from understudy.anatomy import Anatomy, Options, expert_parameters, fingerprint
from understudy.core import Counters, ExpertId, UnderstudyError
from understudy.experts import foresight, kernels
from understudy.experts.compute import ExpertMlp, HostCompute
from understudy.experts.lookahead import Lookahead
from understudy.experts.runtime import Runtime
from understudy.experts.store import Store, slot_bytes
from understudy.experts.transfer import StoreSource, TransferQueue
from understudy.policies import Predictor, RouteTransform
from understudy.policies.director import Director
from understudy.policies.predict import SelfSwitch
from understudy.policies.residency import Residency
from understudy.profile import Profile
from understudy.registry import EVICTORS, PREDICTORS, RESOLVERS, ROUTES

# The first compiling takes seconds and some hundred MiB that no budget knows of: not for small
# models. Counted in parameters, so that packing a model does not change its frame.
COMPILE_PARAMETERS = 500_000_000
PROBE_BYTES = 64 << 20  # read once at the start, to say what speed to expect


def make_predictor(a: Anatomy, o: Options) -> Predictor:
    experts = [m.num_experts for m in a.modules]
    found: Predictor = PREDICTORS.make(
        o.predictor, layers=len(experts), experts=experts, depth=o.depth
    )
    return found


@dataclass(frozen=True)
class Minds:
    """Who decides beside evictor and predictor, and what was learned for them."""

    route: RouteTransform
    foresight: foresight.Foresight | None

    @property
    def needs_residual(self) -> bool:
        return self.foresight is not None and self.foresight.needs_residual

    @classmethod
    def of(cls, a: Anatomy, o: Options, model: Any) -> Minds:
        profile = None if o.profile is None else Profile.load(o.profile, fingerprint(a, model))
        experts = [m.num_experts for m in a.modules]
        route: RouteTransform = ROUTES.make(
            o.route, layers=len(experts), experts=experts, learned=profile, seed=o.seed
        )
        predictor = make_predictor(a, o)
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


class Others(Protocol):
    """Whoever else decides about slots beside the runtime, and counts what it does."""

    @property
    def counters(self) -> Counters: ...
    @property
    def now(self) -> str:
        """Whose turn it is, for people."""


@dataclass
class Built:
    """What a place makes of a plan, and the plan as it was carried out. ``notes``: what a person
    should be told; ``facts``: what `Handle.policies` shows beside the names."""

    plan: planning.Plan
    runtime: Runtime
    store: Store
    notes: list[str]
    facts: dict[str, Any]
    others: Others | None = None

    @property
    def counters(self) -> Counters:
        """Everything counted since the load."""
        own = self.runtime.counters
        return own if self.others is None else own + self.others.counters


class OnHost:
    """Experts computed by the CPU, in slots that are filled from disk."""

    memory_option = "--memory"

    def __init__(self, a: Anatomy, o: Options) -> None:
        self.a, self.o = a, o

    def budget(self) -> int:
        """Bytes that dense weights, slots, KV cache and working memory share."""
        return planning.parse_memory(self.o.memory, self.a.checkpoint.nbytes)

    @property
    def slot_bytes(self) -> int:
        return slot_bytes(self.a.layouts)

    def expect(self, plan: planning.Plan) -> planning.Plan:
        """Write the expected speed on the plan, from one short read of the largest file."""
        largest = max(self.a.checkpoint.files, key=lambda f: f.stat().st_size)
        bandwidth = planning.disk_bandwidth(
            largest, self.o.io_threads, 2 << 20, PROBE_BYTES, direct=self.o.direct_io
        )
        top_k = guest.experts_per_token(self.a.checkpoint.config)
        if not bandwidth or not top_k:
            return plan
        layers = len(self.a.modules)
        return plan.expecting(planning.expected_tokens_per_second(plan, layers, top_k, bandwidth))

    def finish(self, model: Any, built: Built, minds: Minds) -> None:
        """The model is attached; nothing is left to do."""

    def build(
        self, plan: planning.Plan, model: Any, minds: Minds, say: Callable[[str], None]
    ) -> Built:
        a, o, lock = self.a, self.o, threading.RLock()
        store = Store(a.checkpoint.files, a.layouts, plan.slots, direct=o.direct_io)
        director = make_director(a, o, plan, minds, store.nbytes)
        transfer = TransferQueue(
            director.book,
            StoreSource(store),
            lock=lock,
            place=director.place,
            forget=director.forget,
            wanted=director.wanted,
            threads=o.io_threads,
        )
        mlps, choices = host_mlps(a, o.kernel, model)
        routers = guest.routers(model, a.modules)
        runtime = Runtime(
            director=director,
            compute=HostCompute(store, mlps),
            transfer=transfer,
            lock=lock,
            lookahead=Lookahead(routers, _products(choices), minds.foresight),
        )
        built = None if minds.needs_residual else compiled_frame(a, o, model, choices, say)
        facts = {
            "device": "cpu",
            "kernel": ",".join(dict.fromkeys(choice.name for choice in choices)),
            "frame": "eager" if built is None else f"{built.compiled} layers compiled",
        }
        return Built(plan, runtime, store, list(_slower(choices)), facts)


def make_director(
    a: Anatomy, o: Options, plan: planning.Plan, minds: Minds, nbytes: Callable[[ExpertId], int]
) -> Director:
    """The minds of one model, over a fresh book."""
    return Director(
        Residency(plan.slots),
        evictor=EVICTORS.make(o.evictor, slots=plan.slots, layers=len(a.modules)),
        predictor=make_predictor(a, o),
        resolver=RESOLVERS.make(o.resolver),
        route=minds.route,
        switch=SelfSwitch(
            enabled=o.predictor != "none" and plan.slots < plan.experts, adaptive=o.self_switch
        ),
        nbytes=nbytes,
        ample=plan.slots >= plan.experts,
    )


def host_mlps(a: Anatomy, kernel: str, model: Any) -> tuple[list[ExpertMlp], list[kernels.Choice]]:
    """One per MoE layer for the CPU, each with the kernel that its layout asks for."""
    mlps = [ExpertMlp(module, a.checkpoint.format) for module in guest.guests(model)]
    choices = []
    for layer, mlp in enumerate(mlps):
        choice = kernels.choose(kernel, mlp, a.layout_of(layer), model.dtype)
        mlp.native_rows = choice.rows
        choices.append(choice)
    return mlps, choices


def compiled_frame(
    a: Anatomy, o: Options, model: Any, choices: Sequence[kernels.Choice], say: Any
) -> frame.Frame | None:
    """Compile the decoder layers, where that was asked for or pays; ``None``: all eager."""
    small = expert_parameters(a) < COMPILE_PARAMETERS
    if o.frame == "eager" or (o.frame == "auto" and small):
        return None
    products = _products(choices)
    config, guests = guest.text_config(model.config), guest.guests(model)
    routers = guest.routers(model, a.modules)
    built = frame.compile_frame(model, config, guests, routers, products, say)
    for reason in built.eager:
        say(f"note: eager, not compiled: {reason}")
    for reason in built.called:
        say(f"note: compiled, but its calls are not repeated by C: {reason}")
    return built


def _products(choices: Sequence[kernels.Choice]) -> Any:
    """The native products of one row, where the native kernel is in use."""
    native = any(choice.rows for choice in choices)
    return torch.ops.understudy.products.default if native else None


def _slower(choices: Sequence[kernels.Choice]) -> Iterator[str]:
    """Why few tokens are computed by torch, where that was neither asked for nor measured."""
    reasons = {c.why for c in choices if c.microseconds == {} and c.why != kernels.ASKED}
    yield from (f"note: {reason}" for reason in sorted(reasons))
