"""Who is measured: the ways of running a model that does not fit the device.

Knows: the name of each way, the options it is loaded with, what it promises about its answers. Does
not know: how it is loaded, timed or judged. A new way is one entry of `WAYS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from understudy.bench import PRESETS
from understudy.core import UnderstudyError

EXACT, EQUIVALENT, LOSSY = "bit-exact", "equivalent", "lossy"

HOST: Mapping[str, Any] = {"decode": "host"}


@dataclass(frozen=True, slots=True)
class Way:
    """``promise``: bit-exact, equivalent or lossy; ``slots``: instead of the cell's budget;
    ``peer``: not Understudy; ``driven``: by whom a decode step is driven."""

    name: str
    words: str
    promise: str
    options: Mapping[str, Any] = field(default_factory=dict)
    slots: str | None = None
    driven: str = "host"
    peer: bool = False


def _preset(name: str, **changed: Any) -> dict[str, Any]:
    options = {**PRESETS[name].options(), **HOST, **changed}
    del options["slots"]
    return options


PAPER = "router-pf"
RESIDENT = "resident"

# In the order of what they say: where memory or time ends, the last ones are missing.
WAYS = (
    Way(PAPER, "the paper's Router-PF: runs what it foresaw, keeps nothing", LOSSY,
        _preset("paper", predictor="next-gate"), slots="2k"),
    Way("lru+hint", "LRU, and the next layer's experts fetched early", EXACT,
        {"evictor": "lru", "predictor": "next-gate", **HOST}),
    Way("device", "the device decides and fetches by itself", EXACT,
        {"decode": "device"}, driven="device"),
    Way("on-demand", "the paper's baseline: fetches on demand, keeps nothing", EXACT,
        _preset("paper-on-demand"), slots="2k"),
    Way("lru", "LRU, fetches on demand", EXACT, {"evictor": "lru", "predictor": "none", **HOST}),
    Way("lru+hint+cpu", "the same as lru+hint, and the CPU computes a share of the misses",
        EQUIVALENT,
        {"evictor": "lru", "predictor": "next-gate", "resolver": "cpu-split", **HOST}),
    Way("accelerate", "transformers with accelerate: layers in CPU memory, copied when they run",
        EQUIVALENT, peer=True),
)  # fmt: skip

# What all others are compared with; it has a budget of its own: everything.
ALL_RESIDENT = Way(
    RESIDENT, "every expert on the device", EXACT,
    {"evictor": "lru", "predictor": "none", **HOST}, slots="100%",
)  # fmt: skip

NAMES = (*(way.name for way in WAYS), RESIDENT)


def chosen(names: str | None) -> list[Way]:
    """Those named, in our order; all without names."""
    if names is None:
        return list(WAYS)
    asked = [name.strip() for name in names.split(",") if name.strip()]
    for name in asked:
        if name not in NAMES:
            raise UnderstudyError(f"no row {name!r}; use {', '.join(NAMES)}")
    return [way for way in WAYS if way.name in asked]


def with_profile(ways: Sequence[Way], profile: str) -> list[Way]:
    """Router-PF as published asks later routers about its quasi-hidden state, which needs what
    `understudy profile` learned; without it, about the router's input. It copies as much."""
    from dataclasses import replace

    quasi = {"predictor": "quasi-gate", "profile": profile}
    return [
        replace(way, options={**way.options, **quasi}) if way.name == PAPER else way for way in ways
    ]
