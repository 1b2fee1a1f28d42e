"""Wires minds and hands for one loaded model: the one place that knows them all.

Knows: every room below. Does not know: budgets and how they are divided (`plan`), prompts, HTTP.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from understudy import frame
from understudy import model as guest
from understudy import plan as planning
from understudy.anatomy import Anatomy, Options, expert_parameters, fingerprint
from understudy.core import UnderstudyError
from understudy.experts import foresight, kernels
from understudy.experts.compute import ExpertMlp, HostCompute
from understudy.experts.lookahead import Lookahead
from understudy.experts.runtime import Runtime
from understudy.experts.store import Store
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


def on_host(
    a: Anatomy, o: Options, plan: planning.Plan, model: Any, minds: Minds
) -> tuple[Runtime, list[kernels.Choice], Store]:
    """Wire minds and hands: the one place that knows them all."""
    lock = threading.RLock()
    book = Residency(plan.slots)
    store = Store(a.checkpoint.files, a.layouts, plan.slots, direct=o.direct_io)
    speculate = o.predictor != "none" and plan.slots < plan.experts
    director = Director(
        book,
        evictor=EVICTORS.make(o.evictor, slots=plan.slots, layers=len(a.modules)),
        predictor=make_predictor(a, o),
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
    runtime = Runtime(
        director=director,
        compute=HostCompute(store, mlps),
        transfer=transfer,
        lock=lock,
        lookahead=Lookahead(guest.routers(model, a.modules), _products(choices), minds.foresight),
    )
    return runtime, choices, store


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
