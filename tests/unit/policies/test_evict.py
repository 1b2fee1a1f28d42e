"""Evictors: answers known by hand, and an oracle that nobody beats."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import combinations
from typing import Any

import pytest
from unit.policies.traces import TEXTBOOK, at_random, event, singles, sweeps

from understudy.core import NOBODY, ExpertId, LayerEvent, Phase
from understudy.policies import Evictor
from understudy.registry import EVICTORS, ORACLES
from understudy.simulate import replay

NAMES = EVICTORS.builtin_names
ONLINE = [name for name in NAMES if name not in ORACLES]


def make(name: str, *, slots: int = 4, layers: int = 1) -> Evictor:
    found: Evictor = EVICTORS.get(name)(slots=slots, layers=layers)
    return found


def use(evictor: Evictor, layer: int, *experts: int) -> None:
    """One event that finds all it needs, or brings it."""
    needed = [ExpertId(layer, e) for e in experts]
    evictor.touch(event(layer, *experts), needed)
    for expert in needed:
        if expert not in set(evictor.victims(layer, 1)):
            evictor.admit(expert, speculative=False)


def leaving(evictor: Evictor, layer: int, need: int = 1) -> list[ExpertId]:
    """The order in which residents would go; repeats mean nothing."""
    return list(dict.fromkeys(evictor.victims(layer, need)))


def experts(found: Iterable[ExpertId]) -> list[int]:
    return [e.expert for e in found]


# ---------------------------------------------------------------------------- one page at a time


@pytest.mark.parametrize(
    ("name", "misses"), [("lru-global", 12), ("lru-layer", 12), ("lru", 12), ("belady", 9)]
)
def test_the_textbook(name: str, misses: int) -> None:
    counted = replay(singles(TEXTBOOK), slots=3, layers=1, evictor=name)
    assert (counted.misses, counted.hits) == (misses, len(TEXTBOOK) - misses)
    assert counted.evictions == misses - 3


def test_lru_follows_use_not_arrival() -> None:
    lru = make("lru-global")
    for expert in (0, 1, 2, 0):
        use(lru, 0, expert)
    assert experts(leaving(lru, 0)) == [1, 2, 0]


def test_lfu_counts_and_breaks_ties_by_age() -> None:
    lfu = make("lfu")
    for expert in (0, 0, 0, 1, 2, 2, 3):
        use(lfu, 0, expert)
    assert experts(leaving(lfu, 0)) == [1, 3, 2, 0]


def test_lfu_remembers_those_who_left() -> None:
    lfu = make("lfu")
    for expert in (0, 0, 0, 1, 1):
        use(lfu, 0, expert)
    lfu.remove(ExpertId(0, 0))
    use(lfu, 0, 0)
    assert experts(leaving(lfu, 0)) == [1, 0]


def test_lfru_lets_old_fame_fade_and_lfu_does_not() -> None:
    # At the last event: 0 has 4 uses, 5 events ago (4/5); 1 has 3 uses, 2 events ago (3/2).
    refs = (0, 0, 0, 0, 1, 1, 1)
    lfu, lfru = make("lfu"), make("lfru")
    for evictor in (lfu, lfru):
        for expert in refs:
            use(evictor, 0, expert)
        evictor.touch(event(0, 2), [ExpertId(0, 2)])
    assert experts(leaving(lfu, 0)) == [1, 0]
    assert experts(leaving(lfru, 0)) == [0, 1]


def test_belady_looks_ahead() -> None:
    future = singles((0, 1, 2, 1, 0))
    belady = EVICTORS.get("belady")(slots=3, layers=1, future=future)
    for e in future[:3]:
        needed = [ExpertId(0, x) for x in e.needed()]
        belady.touch(e, needed)
        belady.admit(needed[0], speculative=False)
    assert experts(leaving(belady, 0)) == [2, 0, 1]  # never again, last, next


def test_an_oracle_needs_a_future() -> None:
    with pytest.raises(ValueError, match="recorded trace"):
        make("belady")


# ------------------------------------------------------------------------------- several layers


def test_a_layer_gives_its_surplus_first() -> None:
    evictor = make("lru-layer", slots=4, layers=2)  # two slots each
    use(evictor, 0, 0)
    for expert in (10, 11, 12):
        use(evictor, 1, expert)
    assert leaving(evictor, 0)[0] == ExpertId(1, 10)  # layer 1 is one over its share


def test_a_layer_within_its_share_replaces_its_own() -> None:
    evictor = make("lru-layer", slots=4, layers=2)
    use(evictor, 0, 0, 1)
    use(evictor, 1, 0, 1)
    assert leaving(evictor, 1)[:2] == [ExpertId(1, 0), ExpertId(1, 1)]
    assert leaving(evictor, 0)[:2] == [ExpertId(0, 0), ExpertId(0, 1)]


def test_of_several_surpluses_the_layer_that_ran_last_gives_first() -> None:
    evictor = make("lru-layer", slots=3, layers=3)
    for layer in range(3):
        use(evictor, layer, 0, 1)
    assert leaving(evictor, 1)[:2] == [ExpertId(0, 0), ExpertId(2, 0)]


def test_global_lru_cycles_below_one_sweep_and_lru_notices() -> None:
    # Three layers, two experts each, the same in every step: a sweep of six through four slots.
    trace = sweeps(10, [(0, 1), (0, 1), (0, 1)])
    hits = {
        name: replay(trace, slots=4, layers=3, evictor=name, from_event=3).hits
        for name in ("lru-global", "lru-layer", "lru")
    }
    assert hits == {"lru-global": 0, "lru-layer": 18, "lru": 18}  # two of six, nine times


def test_lru_is_global_lru_where_the_sweep_fits() -> None:
    for seed in range(5):
        trace = at_random(seed, steps=40, layers=3, experts=8, k=2)
        counted = [replay(trace, slots=7, layers=3, evictor=name) for name in ("lru", "lru-global")]
        assert counted[0] == counted[1]


def test_lru_changes_its_mind_with_the_size_of_events() -> None:
    lru = make("lru", slots=4, layers=2)
    use(lru, 0, 0, 1)  # 2 experts x 2 layers fit
    use(lru, 1, 0, 1)
    assert leaving(lru, 1)[0] == ExpertId(0, 0)
    use(lru, 1, 0, 1, 2)  # 3 x 2 do not: layer 1 is one over its share, and gives to layer 0
    assert leaving(lru, 0)[0] == ExpertId(1, 0)
    use(lru, 1, 1)
    assert leaving(lru, 0)[0] == ExpertId(0, 0)


@pytest.mark.parametrize("name", ["lru-global", "lru-layer", "lru"])
def test_the_speculated_leave_first_until_somebody_uses_them(name: str) -> None:
    evictor = make(name)
    use(evictor, 0, 0)
    use(evictor, 0, 1)
    evictor.admit(ExpertId(0, 2), speculative=True)
    assert experts(leaving(evictor, 0)) == [2, 0, 1]
    evictor.admit(ExpertId(0, 2), speculative=False)
    assert experts(leaving(evictor, 0)) == [0, 1, 2]


# -------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(4))
def test_every_resident_is_offered_and_nobody_else(name: str, seed: int) -> None:
    dice = random.Random(seed)
    layers, slots = 3, 6
    trace = at_random(seed, steps=30, layers=layers, experts=6, k=2)
    future = {"future": trace} if name in ORACLES else {}
    evictor = EVICTORS.get(name)(slots=slots, layers=layers, **future)
    residents: set[ExpertId] = set()
    for e in trace:
        needed = [ExpertId(e.layer, x) for x in e.needed()]
        evictor.touch(e, needed)
        for expert in needed:
            while expert not in residents and len(residents) >= slots:
                victim = dice.choice([r for r in sorted(residents) if r not in needed])
                evictor.remove(victim)
                residents.remove(victim)
            if expert not in residents:
                evictor.admit(expert, speculative=False)
                residents.add(expert)
        for layer in range(layers):
            assert set(evictor.victims(layer, slots)) == residents


def worth(name: str, past: Sequence[LayerEvent], later: Sequence[LayerEvent]) -> Any:
    """Residents by rule, the slow way: expert -> what it is sorted by."""
    used: dict[ExpertId, list[int]] = {}
    for now, e in enumerate(past, start=1):
        for x in e.needed():
            used.setdefault(ExpertId(e.layer, x), []).append(now)

    def next_use(expert: ExpertId) -> float:
        layer, x = expert
        uses = (i for i, e in enumerate(later) if e.layer == layer and x in e.needed())
        return next(uses, float("inf"))

    def count(expert: ExpertId) -> int:
        return len(used.get(expert, ()))

    def last(expert: ExpertId) -> int:
        return used.get(expert, [0])[-1]

    return {
        "lfu": lambda e: (count(e), last(e), e),
        "lfru": lambda e: (count(e) / (len(past) - last(e) + 1), last(e), e),
        "belady": lambda e: (-next_use(e), e),
    }[name]


@pytest.mark.parametrize("name", ["lfu", "lfru", "belady"])
@pytest.mark.parametrize("seed", range(4))
def test_the_order_is_that_of_sorting_anew(name: str, seed: int) -> None:
    dice = random.Random(seed)
    layers, slots = 3, 8
    trace = at_random(seed, steps=60, layers=layers, experts=6, k=2)
    future = {"future": trace} if name in ORACLES else {}
    evictor = EVICTORS.get(name)(slots=slots, layers=layers, **future)
    residents: set[ExpertId] = set()
    for now, e in enumerate(trace):
        needed = [ExpertId(e.layer, x) for x in e.needed()]
        evictor.touch(e, needed)
        guessed = ExpertId(dice.randrange(layers), dice.randrange(6))
        for expert in (*needed, guessed):
            if expert in residents:
                continue
            if len(residents) == slots:
                victim = dice.choice([r for r in sorted(residents) if r not in needed])
                evictor.remove(victim)
                residents.remove(victim)
            evictor.admit(expert, speculative=expert == guessed)
            residents.add(expert)
        key = worth(name, trace[: now + 1], trace[now + 1 :])
        assert list(evictor.victims(e.layer, slots)) == sorted(residents, key=key)


# -------------------------------------------------------------------------------------- the oracle


@pytest.mark.parametrize("slots", [4, 7, 12])
@pytest.mark.parametrize("seed", range(6))
def test_nobody_beats_belady(seed: int, slots: int) -> None:
    trace = at_random(seed, steps=60, layers=3, experts=8, k=2)
    misses = {n: replay(trace, slots=slots, layers=3, evictor=n).misses for n in NAMES}
    assert misses["belady"] == min(misses.values())
    assert misses["belady"] < misses["lru"]


def fewest_misses(trace: list[LayerEvent], slots: int) -> int:
    """By trying everything: all that an event needs must be there at once, the rest may stay."""
    needs = [frozenset(ExpertId(e.layer, x) for x in e.needed()) for e in trace]

    @cache
    def best(i: int, held: frozenset[ExpertId]) -> int:
        if i == len(needs):
            return 0
        others = sorted(held - needs[i])
        room = min(slots - len(needs[i]), len(others))
        after = (best(i + 1, needs[i] | set(kept)) for kept in combinations(others, room))
        return len(needs[i] - held) + min(after)

    return best(0, frozenset())


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("seed", range(8))
def test_belady_is_the_best_there_is(seed: int, k: int) -> None:
    trace = at_random(seed, steps=8, layers=2, experts=4, k=k, skew=0.5)
    for slots in (2, 3, 4):
        counted = replay(trace, slots=slots, layers=2, evictor="belady")
        assert counted.misses == fewest_misses(trace, slots)


# ------------------------------------------------------------------------- uses that fade (lrfu)


def test_lrfu_mixes_three_half_lives() -> None:
    lrfu = make("lrfu", slots=4, layers=1)
    for expert in (1, 0, 0, 2):
        use(lrfu, 0, expert)
    ages = {0: (1, 2), 1: (3,), 2: (0,)}  # tokens since each use
    for expert, since in ages.items():
        expected = sum(
            share * (1 - left) * left**age
            for left, share in ((0.5, 0.10), (0.95, 0.25), (0.995, 0.65))
            for age in since
        )
        assert lrfu.chance(ExpertId(0, expert)) == pytest.approx(expected)
    assert experts(leaving(lrfu, 0)) == [1, 2, 0]


def test_lrfu_tells_favourites_from_bursts() -> None:
    """Fading fast alone, the old favourite would leave first; slowly alone, it would stay last."""
    lrfu = make("lrfu", slots=4, layers=1)
    for expert, tokens in ((0, 100), (2, 3), (1, 30)):
        for _ in range(tokens):
            use(lrfu, 0, expert)
    assert experts(leaving(lrfu, 0)) == [2, 0, 1]


def test_lrfu_spares_the_layer_that_comes_next() -> None:
    lrfu = make("lrfu", slots=4, layers=2)
    use(lrfu, 0, 0)
    use(lrfu, 1, 0)
    assert leaving(lrfu, 0) == [ExpertId(0, 0), ExpertId(1, 0)]
    assert leaving(lrfu, 1) == [ExpertId(1, 0), ExpertId(0, 0)]


@pytest.mark.parametrize("seed", range(4))
def test_lrfu_orders_all_layers_by_discounted_chance(seed: int) -> None:
    """Whoever came, left or was used since it was last asked."""
    dice = random.Random(seed)
    layers = 3
    lrfu = make("lrfu", slots=9, layers=layers)
    residents: set[ExpertId] = set()
    for e in at_random(seed, steps=40, layers=layers, experts=6, k=2):
        needed = [ExpertId(e.layer, x) for x in e.needed()]
        lrfu.touch(e, needed)
        offered = leaving(lrfu, e.layer)
        worth = [
            lrfu.chance(v) * (1 - 0.5 * ((v.layer - e.layer - 1) % layers) / layers)
            for v in offered
        ]
        assert set(offered) == residents
        assert worth == pytest.approx(sorted(worth))
        for expert in set(needed) - residents:
            lrfu.admit(expert, speculative=False)
        residents |= set(needed)
        for victim in dice.sample(sorted(residents), max(0, len(residents) - 9)):
            lrfu.remove(victim)
            residents.remove(victim)


def test_a_rank_that_runs_nobody_is_nobodys_use() -> None:
    with_gap, without = make("lrfu"), make("lrfu")
    for _ in range(3):
        use(with_gap, 0, 0, 1)
        use(without, 0, 0, 1)
        with_gap.touch(event(0, 0, NOBODY), [ExpertId(0, 0)])
        without.touch(event(0, 0), [ExpertId(0, 0)])
    for expert in (ExpertId(0, 0), ExpertId(0, 1)):
        assert with_gap.chance(expert) == without.chance(expert) > 0


def test_lrfu_keeps_its_marks_over_thousands_of_tokens() -> None:
    lrfu = make("lrfu", slots=4, layers=1)
    for token in range(3000):
        use(lrfu, 0, 1 if token % 4 == 0 else 0)
    # Long averages: three quarters and one quarter, each fresh or stale by a few tokens.
    assert lrfu.chance(ExpertId(0, 0)) == pytest.approx(0.75, abs=0.15)
    assert lrfu.chance(ExpertId(0, 1)) == pytest.approx(0.25, abs=0.15)


def test_a_prompt_in_one_event_counts_like_its_tokens_one_by_one() -> None:
    rows = [[0], [1], [1], [2]]
    together, apart = make("lrfu"), make("lrfu")
    prompt = LayerEvent(0, 0, Phase.PREFILL, rows)
    together.touch(prompt, [ExpertId(0, e) for e in prompt.needed()])
    for row in rows:
        apart.touch(event(0, *row), [ExpertId(0, e) for e in row])
    for expert in range(3):
        one, other = together.chance(ExpertId(0, expert)), apart.chance(ExpertId(0, expert))
        assert one == pytest.approx(other)
