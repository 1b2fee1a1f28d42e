"""Who is fetched and who is computed in place: by hand, by brute force, and never for the worse."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest
from unit.policies.traces import event

from understudy.core import Costs, ExpertId, LayerEvent, Phase
from understudy.policies import Residency
from understudy.policies.resolve import CpuSplit, Ends, Fetch, Makespan, automatic, fetched, phi

EVEN = Costs(link_bandwidth=10e9, host_bandwidth=10e9)
FULL = Residency(0)  # nobody is resident, and there is no free slot


def missing_of(e: LayerEvent) -> list[ExpertId]:
    return [ExpertId(e.layer, expert) for expert in e.needed()]


def numbers(experts: Sequence[ExpertId]) -> list[int]:
    return [e.expert for e in experts]


# ------------------------------------------------------------------------------------ FreeToken's F


@pytest.mark.parametrize(
    ("misses", "link", "host", "count"),
    [
        (1, 3.0, 1.0, 1),  # one expert goes to the faster end
        (1, 1.0, 3.0, 0),
        (1, 1.0, 1.0, 1),  # to the link where both are equal: it stays in the cache
        (2, 1.0, 1.0, 1),
        (8, 1.0, 3.0, 2),  # phi = 1/4
        (8, 3.0, 5.0, 3),
        (
            4,
            1.0,
            9.0,
            0,
        ),  # three experts more on the quick end are sooner done than one on the slow
        (10, 1.0, 9.0, 1),
        (3, 100.0, 1.0, 3),
    ],
)
def test_known_splits(misses: int, link: float, host: float, count: int) -> None:
    assert fetched(misses, link, host) == count


def test_the_split_is_what_trying_all_finds() -> None:
    dice = random.Random(1)
    for _ in range(3000):
        misses, link, host = dice.randint(1, 128), dice.uniform(0.1, 60), dice.uniform(0.1, 300)
        share = phi(link, host)
        later = [max(f * (1 - share), (misses - f) * share) for f in range(misses + 1)]
        found = fetched(misses, link, host)
        assert later[found] == pytest.approx(min(later))
        assert abs(found - share * misses) <= 1


def test_the_split_is_never_later_than_one_end_alone() -> None:
    dice = random.Random(2)
    for _ in range(1000):
        misses, link, host = dice.randint(1, 16), dice.uniform(1, 60), dice.uniform(1, 300)
        count = fetched(misses, link, host)
        assert max(count / link, (misses - count) / host) <= min(misses / link, misses / host)


# ---------------------------------------------------------------------------------------- cpu-split


def test_nothing_is_computed_in_place_before_both_ends_are_measured() -> None:
    for costs in (Costs(), replace(EVEN, host_bandwidth=0), replace(EVEN, link_bandwidth=0)):
        for resolver in (CpuSplit(), Makespan()):
            e = replace(event(0, 3, 1, 2), costs=costs)
            assert resolver.resolve(e, missing_of(e), FULL) == Fetch().resolve(
                e, missing_of(e), FULL
            )


def test_the_most_recently_used_are_fetched_even_if_they_were_hits_then() -> None:
    resolver = CpuSplit()
    for used in (event(0, 0, 1), event(0, 2, 3), event(1, 1, 2), event(0, 3, 4)):
        resolver.touch(used, missing_of(used))
    e = replace(event(0, 0, 1, 2, 3), costs=EVEN)
    answer = resolver.resolve(e, missing_of(e), FULL)
    assert numbers(answer.fetch) == [2, 3]  # in the order of the event
    assert numbers(answer.in_place) == [0, 1]


def test_recency_fetches_what_comes_again() -> None:
    """Experts 0 and 1 come every time beside two strangers; two slots would hold them."""
    recent, misses = CpuSplit(), 0
    here: set[int] = set()
    for step in range(50):
        e = replace(event(0, 2 + 2 * step, 0, 1, 3 + 2 * step, step=step), costs=EVEN)
        missing = [x for x in missing_of(e) if x.expert not in here]
        misses += len(missing)
        answer = recent.resolve(e, missing, FULL)
        recent.touch(e, missing_of(e))
        here = (here & {0, 1}) | set(numbers(answer.fetch))
    assert misses <= 2 * 50 + 6


def test_a_prompt_is_fetched() -> None:
    prompt = LayerEvent(0, 0, Phase.PREFILL, ids=[[0, 1], [1, 2]], costs=EVEN)
    answer = CpuSplit().resolve(prompt, missing_of(prompt), FULL)
    assert numbers(answer.fetch) == [0, 1, 2]
    assert not answer.in_place


@pytest.mark.parametrize("resolver", [CpuSplit, Makespan])
def test_free_slots_are_filled_first(resolver: type[CpuSplit]) -> None:
    e = replace(event(0, 0, 1, 2, 3), costs=replace(EVEN, host_bandwidth=1e12))
    for free, count in ((0, 0), (1, 1), (3, 3), (9, 4)):
        answer = resolver().resolve(e, missing_of(e), Residency(free))
        assert len(answer.fetch) == count
        assert sorted(numbers([*answer.fetch, *answer.in_place])) == [0, 1, 2, 3]


# ----------------------------------------------------------------------------------------- makespan


def batch(tokens: Sequence[int], costs: Costs) -> LayerEvent:
    """Expert i has tokens[i] tokens."""
    rows = [[expert] for expert, n in enumerate(tokens) for _ in range(n)]
    return LayerEvent(0, 0, Phase.DECODE, ids=rows, costs=costs)


def seconds(tokens: Sequence[int], costs: Costs, fetch: Sequence[int]) -> float:
    """When the later end is done, for experts of one byte."""
    host = sum(
        1 / costs.host_bandwidth + (n - 1) / (costs.host_further or costs.host_bandwidth)
        for expert, n in enumerate(tokens)
        if expert not in fetch
    )
    return max(len(fetch) / costs.link_bandwidth, host)


def chosen(tokens: Sequence[int], costs: Costs) -> list[int]:
    e = batch(tokens, costs)
    return numbers(Makespan().resolve(e, missing_of(e), FULL).fetch)


def test_who_has_most_tokens_is_fetched() -> None:
    costs = Costs(link_bandwidth=1.0, host_bandwidth=10.0, host_further=10.0)
    assert chosen([1, 1, 30, 1], costs) == [2]  # 1 s on the link, 0.3 s in place
    assert chosen([1, 1, 1, 1], costs) == []  # 0.4 s in place: any fetch takes longer
    assert chosen([30, 30], costs) == [0, 1]  # 2 s, or 3 s in place for either


def test_further_tokens_may_cost_less_than_the_first() -> None:
    costs = Costs(link_bandwidth=1.0, host_bandwidth=2.0, host_further=100.0)
    assert chosen([20], costs) == []  # 0.5 + 19 / 100 s in place
    assert chosen([20], replace(costs, host_further=0.0)) == [0]  # unmeasured: 10 s


def test_with_one_token_each_it_is_the_split_of_cpu_split() -> None:
    dice = random.Random(3)
    for _ in range(300):
        n = dice.randint(1, 12)
        costs = Costs(dice.uniform(1, 60), host_bandwidth=dice.uniform(1, 300))
        count = fetched(n, costs.link_bandwidth, costs.host_bandwidth)
        assert seconds([1] * n, costs, chosen([1] * n, costs)) == pytest.approx(
            seconds([1] * n, costs, range(count))
        )


def test_no_assignment_is_better() -> None:
    dice = random.Random(4)
    for _ in range(300):
        n = dice.randint(1, 8)
        tokens = [dice.choice([1, 1, 1, 2, 3, 8, 40]) for _ in range(n)]
        costs = Costs(
            link_bandwidth=dice.uniform(1, 60),
            host_bandwidth=dice.uniform(1, 300),
            host_further=dice.choice([0.0, dice.uniform(10, 3000)]),
        )
        all_ways = product([False, True], repeat=n)
        best = min(seconds(tokens, costs, [i for i in range(n) if way[i]]) for way in all_ways)
        own = seconds(tokens, costs, chosen(tokens, costs))
        assert own == pytest.approx(best)
        assert own <= seconds(tokens, costs, range(n)) * (1 + 1e-12)
        assert own <= seconds(tokens, costs, ()) * (1 + 1e-12)


def test_among_equals_the_most_recently_used_is_fetched() -> None:
    resolver = Makespan()
    for used in (event(0, 2), event(0, 1)):
        resolver.touch(used, missing_of(used))
    e = batch([1, 1, 1, 5], Costs(link_bandwidth=1.0, host_bandwidth=1.0))
    assert numbers(resolver.resolve(e, missing_of(e), FULL).fetch) == [1, 3]


# --------------------------------------------------------------------------------------- automatic


def test_a_processor_that_helps_is_asked_to() -> None:
    name, why = automatic(Ends(25e9, 50e9, 20e9, 40e9), expert_bytes=9_400_000, top_k=8)
    assert name == "cpu-split"
    assert "link 25 GB/s alone, 20 beside a processor that reads 40 GB/s, phi 0.33" in why
    assert "\n" not in why


@pytest.mark.parametrize(
    "ends",
    [
        Ends(50e9, 2e9, 49e9, 2e9),  # too slow to matter
        Ends(50e9, 40e9, 15e9, 25e9),  # together they read no more than the link alone
        Ends(50e9, 60e9, 45e9, 50e9, handover=5e-3),  # activations take longer than experts
    ],
)
def test_a_processor_that_does_not_help_is_left_alone(ends: Ends) -> None:
    name, why = automatic(ends, expert_bytes=9_400_000, top_k=8)
    assert name == "fetch"
    assert "link 50 GB/s alone" in why


def test_the_choice_is_that_of_the_predicted_seconds() -> None:
    ends = Ends(10.0, 10.0, 10.0, 10.0)
    assert [ends.fetch_seconds(m, 10) for m in (1, 2, 4)] == [1, 2, 4]
    assert [ends.split_seconds(m, 10) for m in (1, 2, 4)] == [1, 1, 2]
