"""A name -> the object behind it: how `--evictor lfu` finds its class.

Knows: the names of the built-in policies, where each one lives, and how other packages add theirs
(an entry point, or one call of `register`).
Does not know: what a policy does. Nothing is imported before somebody asks for it by name.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from inspect import isfunction, signature
from typing import Any

from understudy.core import UnderstudyError, UnknownName

# What the engine tells a policy; everything else in its signature is a parameter.
CONTEXT = ("slots", "layers", "experts", "depth", "learned", "seed", "future")


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """``buddy:rho=3:stand_in=random`` -> ("buddy", {"rho": 3, "stand_in": "random"})."""
    name, *given = text.strip().split(":")
    parameters = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not equals or not key or not value:
            raise UnknownName(f"{text!r}: parameters are written name:key=value:key=value")
        parameters[key] = _value(value)
    return name, parameters


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _own_parameters(cls: Any) -> list[str]:
    """Named parameters of a class and of those it passes the rest on to."""
    found: dict[str, None] = {}
    for one in getattr(cls, "__mro__", ()):
        made = vars(one).get("__init__")
        if isfunction(made):
            parameters = signature(made).parameters.values()
            found |= dict.fromkeys(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    return list(found)


class Registry:
    """The known names of one kind of thing, in the order in which they were added.

    ``builtin`` maps a name to ``"module:attribute"``. Other packages add names through the entry
    point ``group``; a built-in name or a registered one always wins over an entry point, so that
    installing a package never changes what an existing command line does.
    """

    def __init__(self, kind: str, builtin: Mapping[str, str], group: str) -> None:
        self.kind = kind
        self.group = group
        self._builtin = dict(builtin)
        self._objects: dict[str, Any] = {}
        self._foreign: dict[str, EntryPoint] | None = None

    @property
    def builtin_names(self) -> tuple[str, ...]:
        """The names that come with Understudy; needs no look at other packages."""
        return tuple(self._builtin)

    def register(self, name: str, thing: Any) -> None:
        """Make ``thing`` known as ``name``; a later registration replaces an earlier one."""
        self._objects[name] = thing

    def names(self) -> tuple[str, ...]:
        """Every name that `get` accepts: built-in, then registered, then of other packages."""
        return tuple(dict.fromkeys([*self._builtin, *self._objects, *self._entry_points()]))

    def get(self, name: str) -> Any:
        """The object called ``name``, imported now if it was not before."""
        if name not in self._objects:
            self._objects[name] = self._load(name)
        return self._objects[name]

    def make(self, text: str, **context: Any) -> Any:
        """``name`` or ``name:key=value:key=value`` -> an instance, made with ``context`` and these
        parameters."""
        name, parameters = parse(text)
        cls = self.get(name)
        self._check_parameters(name, cls, parameters)
        return cls(**context, **parameters)

    def check(self, text: str) -> None:
        """Complain about a name or a parameter that does not exist, without making anything."""
        name, parameters = parse(text)
        self._check_parameters(name, self.get(name), parameters)

    def _check_parameters(self, name: str, cls: Any, parameters: Mapping[str, Any]) -> None:
        known = [p for p in _own_parameters(cls) if p not in CONTEXT]
        for given in parameters:
            if given not in known:
                raise UnknownName(
                    f"{self.kind} {name!r} has no parameter {given!r}; it has "
                    f"{', '.join(known) or 'none'}"
                )

    def _load(self, name: str) -> Any:
        if name in self._builtin:
            module, _, attribute = self._builtin[name].partition(":")
            return getattr(import_module(module), attribute)
        if name in self._entry_points():
            return self._entry_points()[name].load()
        raise UnknownName(self._complaint(name))

    def _entry_points(self) -> dict[str, EntryPoint]:
        if self._foreign is None:  # reading the metadata of every installed package is slow: once
            self._foreign = {e.name: e for e in entry_points(group=self.group)}
        return self._foreign

    def _complaint(self, name: str) -> str:
        known = self.names()
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        return f"no {self.kind} named {name!r}{hint} Known: {', '.join(known)}"


EVICTORS = Registry(
    "evictor",
    {
        "lrfu": "understudy.policies.evict:Lrfu",
        "lru": "understudy.policies.evict:Lru",
        "lru-global": "understudy.policies.evict:LruGlobal",
        "lru-layer": "understudy.policies.evict:LruLayer",
        "lfu": "understudy.policies.evict:Lfu",
        "lfru": "understudy.policies.evict:Lfru",
        "belady": "understudy.policies.evict:Belady",
    },
    group="understudy.evictors",
)

PREDICTORS = Registry(
    "predictor",
    {
        "none": "understudy.policies.predict:NoPrediction",
        "last-token": "understudy.policies.predict:LastToken",
        "popularity": "understudy.policies.predict:Popularity",
        "next-gate": "understudy.policies.predict:NextGate",
        "residual-gate": "understudy.policies.predict:ResidualGate",
        "quasi-gate": "understudy.policies.predict:QuasiGate",
        "drift-gate": "understudy.policies.predict:DriftGate",
        "shared-gate": "understudy.policies.predict:SharedGate",
        "estimator": "understudy.policies.predict:Estimated",
        "hybrid": "understudy.policies.predict:Hybrid",
    },
    group="understudy.predictors",
)

ORACLES = ("belady",)  # they need to know the future, which only a recorded trace has


RESOLVERS = Registry(
    "resolver",
    {
        "fetch": "understudy.policies.resolve:Fetch",
        "cpu-split": "understudy.policies.resolve:CpuSplit",
        "makespan": "understudy.policies.resolve:Makespan",
    },
    group="understudy.resolvers",
)

ROUTES = Registry(
    "route transform",
    {
        "as-routed": "understudy.policies.route:AsRouted",
        "speculated": "understudy.policies.route:Speculated",
        "verified": "understudy.policies.route:Verified",
        "buddy": "understudy.policies.buddy:Buddy",
    },
    group="understudy.routes",
)


def require(
    evictor: str, predictor: str, route: str = "as-routed", resolver: str = "fetch"
) -> None:
    """Complain about a mistyped policy before anything slow begins."""
    EVICTORS.check(evictor)
    PREDICTORS.check(predictor)
    ROUTES.check(route)
    RESOLVERS.check(resolver)
    if evictor in ORACLES:
        raise UnknownName(
            f"evictor {evictor!r} knows the future and can only replay traces; use lru or lfu"
        )


CLASSES = ("bit-exact", "equivalent", "lossy")  # from best to worst


def exactness(route: str, resolver: str = "fetch") -> str:
    """What these policies together declare that they may do to the output: one of `CLASSES`."""
    parts = ROUTES.get(parse(route)[0]), RESOLVERS.get(parse(resolver)[0])
    worst: str = max((part.exactness.value for part in parts), key=CLASSES.index)
    return worst


def require_no_device(resolver: str) -> None:
    """Complain about a resolver that has no meaning where everything is computed on the CPU."""
    if RESOLVERS.get(parse(resolver)[0]).needs_device:
        raise UnderstudyError(
            f"--resolver {resolver} computes misses in host memory; it needs --device"
        )


FORMATS = Registry(
    "weight format",
    {
        "bf16": "understudy.formats.stored:BF16",
        "fp16": "understudy.formats.stored:FP16",
        "fp32": "understudy.formats.stored:FP32",
        "int8": "understudy.formats.int8:INT8",
        "int4": "understudy.formats.int4:INT4",
        "mxfp4": "understudy.formats.mxfp4:MXFP4",
        "ct-int4": "understudy.formats.ct_int4:CT_INT4",
        "fp8": "understudy.formats.fp8:FP8",
    },
    group="understudy.formats",
)
