"""Small traces for the tests of minds: by hand, and at random with a seed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from understudy.core import LayerEvent, Phase

TEXTBOOK = (7, 0, 1, 2, 0, 3, 0, 4, 2, 3, 0, 3, 2, 1, 2, 0, 1, 7, 0, 1)  # 3 frames: LRU 12, OPT 9


def event(layer: int, *experts: int, step: int = 0) -> LayerEvent:
    """One token that needs ``experts``, best first."""
    return LayerEvent(step, layer, Phase.DECODE, ids=[list(experts)])


def singles(references: Iterable[int]) -> list[LayerEvent]:
    """One expert per event, one layer: the pages of a textbook."""
    return [event(0, e, step=i) for i, e in enumerate(references)]


def sweeps(steps: int, needs: Sequence[Sequence[int]]) -> list[LayerEvent]:
    """Every step needs the same experts, ``needs[layer]``, layer after layer."""
    return [
        event(layer, *needs[layer], step=s) for s in range(steps) for layer in range(len(needs))
    ]


def at_random(
    seed: int, *, steps: int, layers: int, experts: int, k: int, skew: float = 1.0
) -> list[LayerEvent]:
    """Zipf-like routing in which every layer prefers other experts and often repeats itself."""
    dice = random.Random(seed)
    liked = [dice.sample(range(experts), experts) for _ in range(layers)]
    weights = [(i + 1) ** -skew for i in range(experts)]
    last: list[list[int]] = [[] for _ in range(layers)]
    events = []
    for step in range(steps):
        for layer in range(layers):
            chosen = [e for e in last[layer] if dice.random() < 0.4]
            while len(chosen) < k:
                expert = dice.choices(liked[layer], weights)[0]
                if expert not in chosen:
                    chosen.append(expert)
            last[layer] = chosen
            events.append(event(layer, *chosen, step=step))
    return events
