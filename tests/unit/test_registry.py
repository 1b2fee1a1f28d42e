"""Names find their objects, late; wrong names get a useful answer."""

from __future__ import annotations

import subprocess
import sys

import pytest

from understudy import registry
from understudy.core import UnderstudyError, UnknownName
from understudy.registry import Registry


class FakeEntryPoint:
    """An entry point of a package that is not installed."""

    def __init__(self, name: str, thing: object) -> None:
        self.name, self.thing = name, thing

    def load(self) -> object:
        return self.thing


@pytest.fixture
def cooks() -> Registry:
    return Registry("cook", {"ann": "collections:Counter", "bob": "no_such_module:Bob"}, "x.cooks")


def test_a_built_in_name_is_imported_when_asked_for(cooks: Registry) -> None:
    from collections import Counter

    assert cooks.get("ann") is Counter
    assert cooks.names() == ("ann", "bob")  # bob cannot be imported, and nobody asked


def test_a_typing_error_names_the_nearest() -> None:
    with pytest.raises(UnknownName) as error:
        registry.EVICTORS.get("lruu")
    text = str(error.value)
    assert text.startswith("no evictor named 'lruu'; did you mean 'lru'? Known: lrfu, lru")
    assert "\n" not in text


def test_a_name_unlike_all_others_suggests_nothing(cooks: Registry) -> None:
    with pytest.raises(UnknownName, match=r"no cook named 'zzzzzz'\. Known: ann, bob"):
        cooks.get("zzzzzz")


def test_registering_adds_and_replaces(cooks: Registry) -> None:
    cooks.register("cid", int)
    cooks.register("ann", float)
    assert cooks.get("cid") is int
    assert cooks.get("ann") is float
    assert cooks.names() == ("ann", "bob", "cid")


def test_other_packages_add_names_but_never_take_one(
    cooks: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = [FakeEntryPoint("dan", dict), FakeEntryPoint("ann", list)]
    monkeypatch.setattr(registry, "entry_points", lambda group: foreign)
    from collections import Counter

    assert cooks.get("dan") is dict
    assert cooks.get("ann") is Counter
    assert cooks.names() == ("ann", "bob", "dan")


def test_importing_the_registry_imports_no_policy() -> None:
    code = "import sys, understudy.registry; print([m for m in sys.modules if 'policies' in m])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "book", [registry.EVICTORS, registry.PREDICTORS, registry.RESOLVERS, registry.ROUTES]
)
def test_every_built_in_name_leads_somewhere(book: Registry) -> None:
    for name in book.names():
        assert callable(book.get(name))


@pytest.mark.parametrize(
    ("route", "resolver", "found"),
    [
        ("as-routed", "fetch", "bit-exact"),
        ("as-routed", "cpu-split", "equivalent"),
        ("as-routed", "makespan", "equivalent"),
        ("buddy:rho=2", "fetch", "lossy"),
        ("speculated", "cpu-split", "lossy"),
    ],
)
def test_policies_together_are_as_exact_as_the_worst_of_them(
    route: str, resolver: str, found: str
) -> None:
    assert registry.exactness(route, resolver) == found


def test_a_resolver_that_needs_a_device_is_refused_where_there_is_none() -> None:
    registry.require_no_device("fetch")
    for name in ("cpu-split", "makespan"):
        with pytest.raises(UnderstudyError) as error:
            registry.require_no_device(name)
        assert str(error.value) == (
            f"--resolver {name} computes misses in host memory; it needs --device"
        )
