"""Runs whose seconds are known by hand. A load takes 10 ms, an expert 1 ms, a frame 2 ms."""

from __future__ import annotations

from dataclasses import replace

import pytest
from unit.policies.traces import at_random, event, sweeps

from understudy.core import BudgetTooSmall, LayerEvent, Phase, UnderstudyError
from understudy.simulate import Machine, Minds, Sizes, replay, simulate, sweep

SIZES = Sizes((8, 8), (1000, 1000))
MACHINE = Machine(link=1e5, compute=1e6, frame=2e-3)
LRU = Minds("lru-global")


def milliseconds(values: list[float]) -> list[float]:
    return [round(1000 * value, 9) for value in values]


def test_what_is_there_costs_its_computing_and_the_frame() -> None:
    done = simulate(
        sweeps(3, [(0, 1), (2, 3)]), sizes=SIZES, slots=4, machine=MACHINE, minds=LRU
    )  # fmt: skip
    # Two loads a layer, the first computed while the second flies: 2 + 10 + 10 + 1.
    assert milliseconds(done.steps) == [46.0, 8.0, 8.0]
    assert done.tpot == done.steps[1]
    assert done.counters.stall_seconds == pytest.approx(2 * (10 + 9) / 1000)
    assert done.decode_compute == pytest.approx((3 * 8) / 1000)
    assert (done.hit_rate, done.bytes_per_token) == (8 / 12, 4000 / 3)


def test_hits_are_computed_while_loads_fly() -> None:
    trace = [event(0, 0, step=0), event(0, 0, 1, step=1)]
    done = simulate(trace, sizes=SIZES, slots=4, machine=MACHINE, minds=LRU)
    assert milliseconds(done.steps) == [13.0, 2 + 10 + 1]


def test_a_prompt_is_timed_apart_and_its_further_tokens_cost_less() -> None:
    machine = replace(MACHINE, per_token=1e-4)
    chunks = [LayerEvent(i, 0, Phase.PREFILL, ids=[[0], [0], [0]]) for i in range(2)]
    trace = [*chunks, event(0, 0, step=2)]
    done = simulate(trace, sizes=SIZES, slots=4, machine=machine, minds=LRU)
    first, second = 2 + 10 + 1 + 0.2, 2 + 1 + 0.2
    assert milliseconds(done.prompts) == [round(first + second, 9)]
    assert milliseconds(done.steps) == [3.0]
    assert (done.counters.tokens, done.decode.tokens, done.counters.steps) == (7, 1, 3)


def test_an_event_larger_than_the_slots_runs_in_waves() -> None:
    done = simulate([event(0, 0, 1, 2)], sizes=SIZES, slots=2, machine=MACHINE, minds=LRU)
    # The third load starts when the first expert was computed, at 11, and the link is busy to 20.
    assert milliseconds(done.steps) == [2 + 30 + 1]
    assert (done.counters.misses, done.counters.evictions) == (3, 1)


def guessed(step: int, right: bool) -> list[LayerEvent]:
    """Layer 0 foretells what layer 1 needs, rightly or not; every step needs another expert."""
    own, other = step % 8, (step + 4) % 8
    said = {1: ([[own if right else other]], [[1.0]])}
    return [
        replace(event(0, 0, step=step), lookahead=said),
        event(1, own, step=step),
    ]


def test_a_right_guess_in_time_saves_the_wait() -> None:
    trace = [e for step in range(8) for e in guessed(step, right=True)]
    minds = Minds("lru-global", "next-gate", self_switch=False)
    told = simulate(trace, sizes=SIZES, slots=4, machine=MACHINE, minds=minds)
    blind = simulate(trace, sizes=SIZES, slots=4, machine=MACHINE, minds=LRU)
    assert milliseconds(blind.steps)[1:] == [2 + 1 + 2 + 10 + 1] * 7
    # Offered before layer 0 is computed: 1 + 2 ms of the ten have passed when layer 1 asks.
    assert milliseconds(told.steps)[1:] == [2 + 10 + 1] * 7
    assert (told.counters.late, told.counters.prefetch_used) == (8, 8)
    assert told.counters.prefetch_wasted == 0


def test_a_wrong_guess_under_way_delays_the_demand() -> None:
    trace = [e for step in range(8) for e in guessed(step, right=False)]
    minds = Minds("lru-global", "next-gate", self_switch=False)
    done = simulate(trace, sizes=SIZES, slots=4, machine=MACHINE, minds=minds)
    # Issued when the load of layer 0 has landed, at 12; layer 1 asks at 15 and waits until 22.
    assert milliseconds(done.steps)[0] == 22 + 10 + 1
    # Once wrong, it is no longer likelier than not.
    assert (done.counters.prefetch_issued, done.counters.prefetch_used) == (1, 0)
    assert milliseconds(done.steps)[1] == 2 + 1 + 2 + 10 + 1


def test_a_silent_trace_is_not_held_against_a_predictor() -> None:
    silent = sweeps(2, [(0,), (1,)])
    with pytest.raises(UnderstudyError, match="has no look-ahead; record one with"):
        simulate(silent, sizes=SIZES, slots=4, machine=MACHINE, minds=Minds("lru", "next-gate"))
    told = guessed(0, right=True)
    minds = Minds("lru", "next-gate", depth=2)
    with pytest.raises(UnderstudyError, match="looks 1 ahead; try --depth 1"):
        simulate(told, sizes=SIZES, slots=4, machine=MACHINE, minds=minds)


def test_a_route_is_not_run_without_what_it_reads() -> None:
    trace = [e for step in range(2) for e in guessed(step, right=True)]
    minds = Minds("lru", "next-gate", "speculated")
    with pytest.raises(UnderstudyError, match="reads what was foretold of a layer"):
        simulate(trace, sizes=SIZES, slots=4, machine=MACHINE, minds=minds)


def test_a_trace_is_left_as_it_was() -> None:
    trace = [e for step in range(4) for e in guessed(step, right=True)]
    before = [replace(e) for e in trace]
    minds = Minds("lrfu", "next-gate")
    simulate(trace, sizes=SIZES, slots=4, machine=MACHINE, minds=minds)
    assert trace == before


@pytest.mark.parametrize("evictor", ["lru", "lrfu", "lfu", "belady"])
@pytest.mark.parametrize("slots", [3, 7, 12])
def test_time_changes_nothing_for_demand_policies(evictor: str, slots: int) -> None:
    trace = at_random(5, steps=40, layers=2, experts=8, k=3)
    timed = simulate(trace, sizes=SIZES, slots=slots, machine=MACHINE, minds=Minds(evictor))
    counted = replay(trace, slots=slots, layers=2, evictor=evictor)
    for name in ("events", "hits", "misses", "evictions"):
        assert getattr(timed.counters, name) == getattr(counted, name)


# -------------------------------------------------------------------------------- computed in place

# The processor takes 5 ms for an expert, half as long as a load.
HELPED = replace(MACHINE, host=2e5)


def strangers(steps: int, k: int) -> list[LayerEvent]:
    """Every token needs others; 2 slots hold none of them."""
    return [event(0, *((i + k * s) % 8 for i in range(k)), step=s) for s in range(steps)]


def test_the_processor_computes_misses_while_loads_fly() -> None:
    done = simulate(
        strangers(3, k=3), sizes=SIZES, slots=2, machine=HELPED,
        minds=Minds("lru-global", resolver="cpu-split"),
    )  # fmt: skip
    # First nothing is measured, and two slots run three experts in waves: 2 + 3 x 10 + 1. Then one
    # of three is fetched, and two take the processor 10 ms: nobody waits for it. One of these two
    # follows from 12 to 22, so that the next load, asked for at 13 + 2, arrives at 32.
    assert milliseconds(done.steps) == [33.0, 2 + 10 + 1, 32 + 1 - 13]
    c = done.counters
    assert (c.misses, c.computed_in_place, c.demand_bytes) == (9, 4, 5 * 1000)


def test_what_was_computed_in_place_follows_while_nobody_needs_the_link() -> None:
    machine = replace(HELPED, frame=2e-2)
    trace = [event(0, 7, step=0), *(event(0, 0, step=1 + s) for s in range(3))]
    done = simulate(
        trace, sizes=SIZES, slots=1, machine=machine,
        minds=Minds("lru-global", resolver="cpu-split"),
    )  # fmt: skip
    assert milliseconds(done.steps) == [20 + 10 + 1, 20 + 5, 20 + 1, 20 + 1]
    c = done.counters
    assert (c.computed_in_place, c.hits, c.prefetch_used, c.prefetch_wasted) == (1, 2, 1, 0)


def test_waiting_for_the_processor_is_stall() -> None:
    slow = replace(MACHINE, host=1.25e5)  # 8 ms: alone it is still sooner than the link
    done = simulate(
        strangers(2, k=1), sizes=SIZES, slots=1, machine=slow,
        minds=Minds("lru-global", resolver="cpu-split"),
    )  # fmt: skip
    assert milliseconds(done.steps) == [2 + 10 + 1, 2 + 8]
    assert done.counters.stall_seconds == pytest.approx((10 + 8) / 1000)
    assert done.counters.computed_in_place == 1


def test_further_tokens_cost_the_processor_their_own_time() -> None:
    machine = replace(MACHINE, host=1e6, host_further=1e6)
    batch = [LayerEvent(s, 0, Phase.DECODE, ids=[[2 * s], [2 * s], [2 * s + 1]]) for s in range(2)]
    done = simulate(
        batch, sizes=SIZES, slots=1, machine=machine, minds=Minds("lru-global", resolver="makespan")
    )
    # Unmeasured, one slot: a wave for each of two. Then three tokens of two experts in place.
    assert milliseconds(done.steps) == [2 + 10 + 1 + 10 + 1, 2 + 3]
    unmeasured = replace(machine, host_further=0.0)
    assert unmeasured.host_seconds(2, 1000, 3) == machine.host_seconds(2, 1000, 3)


def test_an_event_with_speculation_waits_for_the_processor_too() -> None:
    trace = [e for step in range(2) for e in guessed(step, right=True)]
    trace[2].ids = [[5]]  # layer 0 needs a stranger, too
    minds = Minds("lru-global", "next-gate", resolver="cpu-split", self_switch=False)
    done = simulate(trace, sizes=SIZES, slots=2, machine=HELPED, minds=minds)
    # Layer 0 is done in place at 7; what it foretold of layer 1 flies from 2 to 12 meanwhile.
    assert milliseconds(done.steps)[1:] == [12 + 1]
    assert (done.counters.computed_in_place, done.counters.late) == (1, 2)


def test_sharing_out_is_never_later_than_fetching() -> None:
    trace = at_random(11, steps=60, layers=2, experts=8, k=4)
    for slots in (2, 5, 9):
        fetch = simulate(trace, sizes=SIZES, slots=slots, machine=HELPED, minds=LRU)
        for name in ("cpu-split", "makespan"):
            minds = Minds("lru-global", resolver=name)
            split = simulate(trace, sizes=SIZES, slots=slots, machine=HELPED, minds=minds)
            assert split.counters.lookups == fetch.counters.lookups
            assert split.tpot_mean < fetch.tpot_mean


def test_nobody_computes_in_place_where_no_processor_is_declared() -> None:
    with pytest.raises(UnderstudyError, match="in host memory, and nothing is said of"):
        simulate(
            [event(0, 0)], sizes=SIZES, slots=1, machine=MACHINE, minds=Minds(resolver="makespan")
        )


# ------------------------------------------------------------------------------------------ sweeps


def test_nothing_beats_its_floor_and_the_oracle_comes_last() -> None:
    trace = at_random(7, steps=60, layers=2, experts=8, k=3)
    policies = {name: (Minds(name), None) for name in ("lru", "lrfu", "belady")}
    rows = sweep(
        trace, sizes=SIZES, budgets=[4000, 9000], machines=[MACHINE, replace(MACHINE, link=1e6)],
        policies=policies,
    )  # fmt: skip
    assert [row.policy for row in rows] == ["lru", "lrfu", "belady"] * 4
    for row in rows:
        assert row.times_floor >= 1
        assert row.floor_belady <= row.floor_own
    by_policy = {r.policy: r for r in rows[:3]}
    assert by_policy["belady"].outcome.hit_rate > by_policy["lru"].outcome.hit_rate
    assert by_policy["belady"].floor_own == by_policy["lru"].floor_belady


def test_a_policy_may_be_given_fewer_slots_than_the_budget_holds() -> None:
    trace = sweeps(3, [(0, 1), (2, 3)])
    rows = sweep(
        trace, sizes=SIZES, budgets=[8000], machines=[MACHINE], policies={"none": (LRU, 2)}
    )  # fmt: skip
    assert [row.outcome.slots for row in rows] == [2, 8]


def test_a_slot_takes_the_largest_expert() -> None:
    mixed = Sizes((4, 4), (1000, 3000))
    assert (mixed.total, mixed.slots(7000), mixed.slots(10**9)) == (16000, 2, 8)


def test_a_budget_without_room_is_refused_with_one_that_has() -> None:
    with pytest.raises(BudgetTooSmall, match="smallest --memory is 2000"):
        sweep([event(0, 0)], sizes=SIZES, budgets=[1999], machines=[MACHINE], policies={})
