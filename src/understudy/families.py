"""Which model families of the installed transformers the engine can run, found out by looking.

Knows: how a modelling file marks an Experts class (the ``use_experts_implementation`` decorator).
Does not know: a list of families. A new transformers release shows up here by itself.

The sources are parsed, not imported: importing every modelling file takes minutes.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

DECORATOR = "use_experts_implementation"

# Mixture-of-Experts families that keep a contract of their own. Kept only so that `support` can
# give a reason; one that gains the decorator leaves this list by itself.
WITHOUT_INTERFACE = (
    "dbrx",
    "doge",
    "jetmoe",
    "llama4",
    "longcat_flash",
    "nllb_moe",
    "step3p7",
    "switch_transformers",
)

# Reasons found by tests/families: the family carries the interface and still does not work.
FAILS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Family:
    """One family: ``name`` is its folder in transformers, ``experts_classes`` the exact names of
    its Experts classes, ``modeling_module`` where they are defined."""

    name: str
    experts_classes: tuple[str, ...]
    modeling_module: str


class Support(NamedTuple):
    supported: bool
    reason: str


@cache
def families() -> Mapping[str, Family]:
    """Every family whose modelling file uses the experts interface, by name."""
    found = {}
    for file in sorted(_models_folder().glob("*/modeling_*.py")):
        text = file.read_text(encoding="utf-8")
        if DECORATOR not in text:
            continue
        classes = _decorated(text)
        name = file.parent.name
        if classes:
            module = f"transformers.models.{name}.{file.stem}"
            found[name] = Family(name, classes, module)
    return MappingProxyType(found)


@cache
def experts_classes() -> Mapping[str, str]:
    """Exact name of every Experts class -> the module that defines it.

    One set for all families: a composite model borrows its text model from another family, so
    the modules of one model type are not enough.
    """
    return MappingProxyType(
        {
            name: family.modeling_module
            for family in families().values()
            for name in family.experts_classes
        }
    )


def support() -> dict[str, Support]:
    """Every MoE family we know of -> whether it runs, and if not why."""
    known = {
        name: Support(name not in FAILS, FAILS.get(name, "uses transformers' experts interface"))
        for name in families()
    }
    for name in WITHOUT_INTERFACE:
        if name not in known and (_models_folder() / name).is_dir():
            known[name] = Support(False, "does not use transformers' experts interface")
    return dict(sorted(known.items()))


def _models_folder() -> Path:
    spec = find_spec("transformers")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("transformers is not installed: pip install transformers")
    return Path(spec.origin).parent / "models"


def _decorated(text: str) -> tuple[str, ...]:
    """Names of the classes in a source text that carry the decorator, in order."""
    return tuple(
        node.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ClassDef) and any(_is_ours(d) for d in node.decorator_list)
    )


def _is_ours(decorator: ast.expr) -> bool:
    called = decorator.func if isinstance(decorator, ast.Call) else decorator
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", None)
    return name == DECORATOR
