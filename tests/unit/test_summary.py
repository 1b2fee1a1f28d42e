"""Summaries against a hand-known trace, slow obvious counting, and the engine's own LRU."""

from __future__ import annotations

import random
from itertools import pairwise, permutations
from math import isnan, log
from statistics import mean

import numpy as np
import pytest

from understudy import summary
from understudy.core import NOBODY, LayerEvent, Phase
from understudy.simulate import replay
from understudy.summary import LayerSummary, summarise
from understudy.trace import Shape, Trace

Texts = list[list[list[int]]]


def trace(texts: Texts, experts: int, layers: int = 1) -> Trace:
    """All layers route alike; each text's first two tokens are its prompt."""
    found = Trace(Shape("toy", (experts,) * layers, len(texts[0][0]), (1,) * layers))
    for number, rows in enumerate(texts):
        for step, ids in enumerate([rows[:2], *([row] for row in rows[2:])]):
            phase = Phase.DECODE if step else Phase.PREFILL
            for layer in range(layers):
                found.events.append(LayerEvent(step, layer, phase, ids))
                found.sequences.append(number)
    return found


def only(texts: Texts, experts: int) -> LayerSummary:
    (one,) = summarise(trace(texts, experts)).layers
    return one


def drifting(rng: random.Random, tokens: int, experts: int, k: int) -> list[list[int]]:
    """Neighbours resemble each other, some experts are popular, ranks are in any order."""
    rows, now = [], rng.sample(range(experts), k)
    for _ in range(tokens):
        now = [e for e in now if rng.random() < 0.6]
        while len(now) < k:
            new = min(rng.randrange(experts), rng.randrange(experts))
            now += [new] * (new not in now)
        rng.shuffle(now)
        rows.append(list(now))
    return rows


# ------------------------------------------------------------------------------------- by hand


def test_a_small_trace_by_hand() -> None:
    one = only([[[0, 1], [1, 2], [0, 1]], [[3, 0], [3, 0]]], 8)
    assert (one.layer, one.tokens, one.used) == (0, 5, 4 / 8)
    # Pairs: {0,1}-{1,2}: 1 of 2; {1,2}-{0,1}: 1 of 2; {3,0}-{3,0}: 2 of 2.
    assert one.overlap == pytest.approx((0.5 + 0.5 + 1) / 3)
    assert one.overlap_uniform == pytest.approx(2 / 8)
    uses = [4, 3, 1, 2]  # of experts 0, 1, 2, 3
    assert one.entropy == pytest.approx(-sum(n / 10 * log(n / 10) for n in uses))
    assert one.entropy_share == pytest.approx(one.entropy / log(8))
    # Repeats: 1 after 1 token; 0 after 2, 1 after 1; 3 and 0 after 1 each.
    assert one.gap == (1.0, pytest.approx(np.percentile([1, 1, 1, 1, 2], 90)))
    # Last uses, latest first, at the look-up: [1 0]: 1 is first. [2 1 0]: 0 third, 1 second.
    # [0 3]: 3 is second and 0 first.
    assert one.stack == (2.0, pytest.approx(np.percentile([1, 3, 2, 2, 1], 90)))
    # Nobody has more than four partners.
    assert one.partners == 1.0


def test_popular_partners_by_hand() -> None:
    """Expert 0 meets 1..6: 1 to 4 twice, 5 and 6 once. Its four friends have 8 of 10; who met only
    it has one partner."""
    rows = [[0, e] for e in (1, 2, 3, 4)] * 2 + [[0, 5], [0, 6]]
    assert only([rows], 8).partners == pytest.approx((10 * 0.8 + 10 * 1.0) / 20)


def test_one_token_says_nothing_about_time() -> None:
    one = only([[[0, 1]]], 4)
    assert (one.tokens, one.used) == (1, 0.5)
    unknown = (one.overlap, one.overlap_uniform, one.overlap_any, *one.gap, *one.stack)
    assert all(map(isnan, unknown))


def test_texts_do_not_meet() -> None:
    """The last token of a text and the first of the next are no neighbours."""
    one = only([[[0, 1]], [[0, 1]]], 4)
    assert isnan(one.overlap)
    assert one.overlap_any == 1.0


def test_ranks_that_run_nobody_are_left_out() -> None:
    full = only([[[0], [1], [0]]], 4)
    holes = only([[[0, NOBODY], [NOBODY, 1], [0, NOBODY]]], 4)
    for name in ("used", "overlap", "overlap_any", "entropy", "gap", "stack"):
        assert getattr(full, name) == getattr(holes, name)


# ------------------------------------------------------------------------- against slow counting


def slow_distances(texts: Texts) -> tuple[list[int], list[int]]:
    gaps, stacks = [], []
    for rows in texts:
        order: list[int] = []  # latest first
        seen: dict[int, int] = {}
        for number, row in enumerate(rows):
            for expert in row:
                if expert in seen:
                    gaps.append(number - seen[expert])
                    stacks.append(1 + order.index(expert))
            for expert in row:
                if expert in order:
                    order.remove(expert)
                order.insert(0, expert)
                seen[expert] = number
    return gaps, stacks


def slow_partners(rows: list[list[int]]) -> float:
    shares = []
    for row in rows:
        for expert in row:
            others = [e for other in rows if expert in other for e in other if e != expert]
            counts = sorted((others.count(e) for e in set(others)), reverse=True)
            shares.append(sum(counts[: summary.TOP]) / len(others))
    return mean(shares)


@pytest.mark.parametrize("seed", range(8))
def test_figures_equal_slow_counting(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary, "PIECE", 7)  # several pieces to a text
    rng = random.Random(seed)
    texts = [drifting(rng, tokens, 12, 3) for tokens in (30, 2, 41)]
    one = only(texts, 12)
    gaps, stacks = slow_distances(texts)
    for spread, values in ((one.gap, gaps), (one.stack, stacks)):
        assert spread == pytest.approx(tuple(np.percentile(values, (50, 90))))
    rows = [row for text in texts for row in text]
    common = [len({*now} & {*before}) / 3 for text in texts for before, now in pairwise(text)]
    assert one.overlap == pytest.approx(mean(common))
    assert one.overlap_any == pytest.approx(
        mean(len({*a} & {*b}) / 3 for a, b in permutations(rows, 2))
    )
    assert one.partners == pytest.approx(slow_partners(rows))


def test_all_layers_together() -> None:
    rng = random.Random(3)
    one, two = ([drifting(rng, tokens, 10, 2)] for tokens in (40, 40))
    both = trace(one, 10, layers=2)
    for event, row in zip(both.events[1::2], [two[0][:2], *([r] for r in two[0][2:])], strict=True):
        event.ids = row
    told = summarise(both)
    assert [layer.layer for layer in told.layers] == [0, 1]
    assert (told.overall.layer, told.overall.tokens) == (None, 80)
    assert told.overall.overlap == pytest.approx(mean(x.overlap for x in told.layers))
    gaps = slow_distances(one)[0] + slow_distances(two)[0]
    assert told.overall.gap == pytest.approx(tuple(np.percentile(gaps, (50, 90))))


# --------------------------------------------------------- against the engine and against chance


@pytest.mark.parametrize("slots", [3, 4, 6, 9])
@pytest.mark.parametrize("k", [1, 3])
def test_stack_distances_are_the_hits_of_the_engines_lru(slots: int, k: int) -> None:
    """A cache of n experts hits what has a stack distance of at most n, event by event. Who of one
    token was used last is for the engine to say: it takes those first that are there."""
    rows = drifting(random.Random(slots), 300, 12, k)
    stack = only([rows], 12).stack
    _, stacks = summary._distances(np.array(rows), 12)
    assert stack == pytest.approx(tuple(np.percentile(stacks, (50, 90))))
    events = [LayerEvent(step, 0, Phase.DECODE, [row]) for step, row in enumerate(rows)]
    counted = replay(events, slots=slots, layers=1, evictor="lru")
    told = int((stacks <= slots).sum())
    assert counted.hits == told if k == 1 else counted.hits == pytest.approx(told, rel=0.01)
    assert 0 < counted.hits < counted.lookups


def test_chance_is_what_chance_gives() -> None:
    rng = random.Random(0)
    one = only([[rng.sample(range(16), 4) for _ in range(4000)]], 16)
    assert one.overlap == pytest.approx(one.overlap_uniform, abs=0.01)
    assert one.overlap_any == pytest.approx(4 / 16, abs=0.01)
    assert one.partners == pytest.approx(one.partners_uniform, abs=0.01)
    assert one.partners_uniform == pytest.approx(4 / 15, abs=0.03)  # the limit of many tokens
    assert one.entropy_share == pytest.approx(1, abs=0.01)
    assert one.used == 1.0


def test_few_tokens_have_favourites_by_accident() -> None:
    """Sixty tokens of a router that does not look have favourite partners too, and are not told to
    be special."""
    rng = random.Random(1)
    one = only([[rng.sample(range(64), 4) for _ in range(60)]], 64)
    assert one.partners > 3 * 4 / 63
    assert one.partners == pytest.approx(one.partners_uniform, abs=0.05)


def test_popularity_is_told_apart_from_company_and_time() -> None:
    """Popular experts, chosen without regard to each other or to the token before."""
    dice = np.random.default_rng(2)
    odds = np.array([8.0, 4.0, 4.0, 2.0, *[0.5] * 28])
    rows = summary._drawn(dice, np.full(3000, 4.0), odds)
    one = only([[np.flatnonzero(row).tolist() for row in rows]], 32)
    assert one.overlap > 2 * one.overlap_uniform
    assert one.overlap == pytest.approx(one.overlap_any, abs=0.02)
    assert one.partners > 2 * one.partners_uniform
    assert one.partners == pytest.approx(one.partners_popular, abs=0.03)


def test_company_is_more_than_popularity() -> None:
    """Experts come in fours: everybody is as popular as everybody, and nobody comes alone."""
    rng = random.Random(4)
    firsts = [4 * rng.randrange(8) for _ in range(2000)]
    rows = [[first, first + 1, first + 2, first + 3] for first in firsts]
    one = only([rows], 32)
    assert one.partners == 1.0
    assert one.partners_popular == pytest.approx(one.partners_uniform, abs=0.02)
    assert one.partners_popular < 0.25


def test_a_summary_repeats_itself() -> None:
    found = trace([drifting(random.Random(5), 50, 12, 3)], 12)
    assert summarise(found) == summarise(found)
