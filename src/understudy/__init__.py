"""Understudy runs Mixture-of-Experts language models that are larger than the memory they get.

The public names, imported when first used: `import understudy` itself costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from understudy.core import Counters, UnderstudyError
    from understudy.engine import Engine, Generation
    from understudy.loading import Inspection, Options, inspect, load

__version__ = "0.1.0"

_HOME = {
    "load": "loading",
    "inspect": "loading",
    "Inspection": "loading",
    "Options": "loading",
    "Engine": "engine",
    "Generation": "engine",
    "Counters": "core",
    "UnderstudyError": "core",
}

__all__ = [
    "Counters",
    "Engine",
    "Generation",
    "Inspection",
    "Options",
    "UnderstudyError",
    "inspect",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'understudy' has no attribute {name!r}")
    return getattr(import_module(f"understudy.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
