"""A control is held to the count of what it controls for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from understudy.core import NOBODY, LayerEvent, Phase
from understudy.policies import RouteTransform
from understudy.policies.matched import AtRate, changed
from understudy.policies.residency import Residency

LAYERS = 10
BOOK = Residency(2)


class DropsTwo(RouteTransform):
    """Leaves out the first two experts of every token."""

    def transform(self, event: LayerEvent, book: Residency) -> LayerEvent:
        return replace(event, ids=[[NOBODY, NOBODY, *row[2:]] for row in event.ids])


def decoded(route: RouteTransform, tokens: int) -> Counter[int]:
    """Layer -> changes, over so many decode steps of every layer."""
    found: Counter[int] = Counter()
    for step in range(tokens):
        for layer in range(LAYERS):
            event = LayerEvent(step, layer, Phase.DECODE, ids=[[0, 1, 2, 3]])
            found[layer] += changed(event, route.transform(event, BOOK))
    return found


@pytest.mark.parametrize("rate", [0.5, 2.9, 10.0])
def test_the_count_is_held(rate: float) -> None:
    found = decoded(AtRate(DropsTwo(layers=LAYERS), rate), tokens=400)
    assert found.total() / 400 == pytest.approx(rate, rel=0.03)
    fair = found.total() / LAYERS
    noise = (2 * fair) ** 0.5  # of events that change two or none, each with the same chance
    assert all(abs(found[layer] - fair) < 4 * noise for layer in range(LAYERS))


def test_no_more_can_be_changed_than_there_is() -> None:
    found = decoded(AtRate(DropsTwo(layers=LAYERS), rate=1000.0), tokens=20)
    assert found.total() == 20 * LAYERS * 2


def test_nothing_is_nothing() -> None:
    assert decoded(AtRate(DropsTwo(layers=LAYERS), rate=0.0), tokens=50).total() <= 2


def test_prompts_are_left_to_the_other() -> None:
    prompt = LayerEvent(0, 0, Phase.PREFILL, ids=[[0, 1, 2], [0, 1, 2]])
    assert changed(prompt, AtRate(DropsTwo(layers=LAYERS), 0.0).transform(prompt, BOOK)) == 4


def test_it_asks_for_what_the_other_asks() -> None:
    class Curious(DropsTwo):
        wants_scores = True

    assert AtRate(Curious(layers=LAYERS), 1.0).wants_scores
    assert not AtRate(DropsTwo(layers=LAYERS), 1.0).wants_scores


def test_changes_are_counted_as_the_runtime_counts_them() -> None:
    asked = LayerEvent(0, 0, Phase.DECODE, ids=[[0, 1, 2]])
    assert changed(asked, asked) == 0
    assert changed(asked, replace(asked, ids=[[2, 0, 1]])) == 0  # the same, in another order
    assert changed(asked, replace(asked, ids=[[5, 1, NOBODY]])) == 2
