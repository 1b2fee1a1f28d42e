"""One event in, one plan out: who is there, who comes, who leaves, and in what order."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import pytest
from unit.policies.traces import at_random, event

from understudy.core import ExpertId, Guess, LayerEvent, LayerPlan, Load, Phase
from understudy.policies import MissResolver, Predictor, Resolution
from understudy.policies.director import FOLLOWERS, Director
from understudy.policies.predict import SelfSwitch
from understudy.policies.residency import Residency, State
from understudy.policies.resolve import Fetch
from understudy.policies.route import AsRouted
from understudy.registry import EVICTORS
from understudy.simulate import replay

LAYERS = 4
SIZE = 100  # bytes per expert


class Scripted(Predictor):
    """Guesses what it was told to, layer by layer."""

    def __init__(self, script: Mapping[int, Sequence[Guess]]) -> None:
        super().__init__(layers=LAYERS, experts=[8] * LAYERS)
        self.script = script

    def predict(self, event: LayerEvent) -> list[Guess]:
        return list(self.script.get(event.layer, ()))


def guess(layer: int, expert: int, probability: float = 0.5, ahead: int = 1) -> Guess:
    return Guess(ExpertId(layer, expert), probability, ahead)


def direct(
    slots: int,
    script: Mapping[int, Sequence[Guess]] | None = None,
    *,
    evictor: str = "lru-global",
    resolver: MissResolver | None = None,
    speculate: bool = True,
) -> Director:
    return Director(
        Residency(slots),
        evictor=EVICTORS.get(evictor)(slots=slots, layers=LAYERS),
        predictor=Scripted(script or {}),
        resolver=resolver or Fetch(),
        route=AsRouted(),
        switch=SelfSwitch(enabled=speculate, adaptive=False),
        nbytes=lambda expert: SIZE,
    )


def foreseen(director: Director, e: LayerEvent) -> tuple[Guess, ...]:
    return director.foresee(director.decide(e).event)


def arrive(director: Director, *experts: ExpertId) -> None:
    for expert in experts:
        director.book.launch(expert)
        director.book.land(expert)


def carry_out(director: Director, e: LayerEvent, dice: random.Random | None = None) -> LayerPlan:
    """What the runtime does, one thing at a time, with loads that land in any order. Nobody may be
    computed who is not there, and nobody may leave before having been computed."""
    plan = director.decide(e)
    book, todo, waiting = director.book, list(plan.order), list(plan.loads)
    pinned = [*plan.hits, *plan.late]
    for expert in pinned:
        book.pin(expert)
    while todo:
        for load in list(waiting):
            if not director.may_start(load):
                continue
            waiting.remove(load)
            director.commit(load)
            book.pin(load.expert)
            book.launch(load.expert)
        flying = [x for x in book if book.state(x) is State.IN_FLIGHT]
        if flying:
            book.land(dice.choice(flying) if dice else flying[0])
        ready = [x for x in todo if book.ready(x)]
        assert ready or flying, f"stuck: {todo} wait for {waiting}"
        if ready:
            todo.remove(ready[0])
            book.unpin(ready[0])
        book.check_integrity()
    assert not waiting
    director.foresee(plan.event)
    book.check_integrity(idle=True)
    return plan


def speculate(director: Director, *guesses: Guess) -> None:
    """Guesses that are issued and arrive."""
    for g in guesses:
        assert director.place(g) is not None
        arrive(director, g.expert)


def there(director: Director) -> set[tuple[int, int]]:
    return {tuple(e) for e in director.book}


# --------------------------------------------------------------------------------------- looking up


def test_hit_late_and_missing() -> None:
    d = direct(4, {0: [guess(1, 1)]})
    carry_out(d, event(0, 0))
    carry_out(d, event(1, 0))
    foreseen(d, event(0, 0))  # now (1, 1) is wanted
    assert d.place(guess(1, 1)) is not None
    d.book.launch(ExpertId(1, 1))
    plan = d.decide(event(1, 0, 1, 2))
    assert plan.hits == (ExpertId(1, 0),)
    assert plan.late == (ExpertId(1, 1),)
    assert plan.loads == (Load(ExpertId(1, 2), None),)
    assert plan.order == (ExpertId(1, 0), ExpertId(1, 1), ExpertId(1, 2))
    c = d.counters
    assert (c.hits, c.late, c.misses, c.lookups) == (2, 1, 3, 6)


def test_hits_are_computed_first_whatever_their_rank() -> None:
    d = direct(4)
    carry_out(d, event(0, 3))
    plan = d.decide(event(0, 1, 2, 3))
    assert plan.order == (ExpertId(0, 3), ExpertId(0, 1), ExpertId(0, 2))


def test_free_slots_before_victims() -> None:
    d = direct(3)
    carry_out(d, event(0, 0, 1))
    plan = d.decide(event(1, 0, 1))
    assert [load.victim for load in plan.loads] == [None, ExpertId(0, 0)]


def test_the_same_event_s_experts_stay_however_old() -> None:
    d = direct(3)
    for expert in (0, 1, 2):
        carry_out(d, event(0, expert))
    carry_out(d, event(0, 3, 0, 4))  # 0 is the least recently used of all
    assert there(d) == {(0, 0), (0, 3), (0, 4)}


def test_counters_add_up() -> None:
    d = direct(5)
    trace = at_random(3, steps=20, layers=LAYERS, experts=8, k=2)
    plans = [carry_out(d, e) for e in trace]
    c = d.counters
    assert c.events == len(trace)
    assert c.hits + c.late + c.misses == c.lookups == sum(len(e.needed()) for e in trace)
    assert c.misses == sum(len(p.loads) for p in plans)
    assert c.demand_bytes == c.misses * SIZE == c.bytes_read
    assert c.evictions == c.misses - 5
    assert (c.prefetch_issued, c.prefetch_bytes, c.wasted_bytes) == (0, 0, 0)
    for name in ("events", "hits", "late", "misses"):
        assert sum(getattr(row, name) for row in d.by_layer.values()) == getattr(c, name)
    assert d.by_layer[2].events == sum(e.layer == 2 for e in trace)


# ---------------------------------------------------------------------------------------- resolving


class ByNumber(MissResolver):
    """Even experts are fetched, the last first; 1 is computed in place; others are left out."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[ExpertId], int]] = []
        self.told: list[list[ExpertId]] = []

    def resolve(
        self, event: LayerEvent, missing: Sequence[ExpertId], book: Residency
    ) -> Resolution:
        self.asked.append((list(missing), len(self.told)))
        even = [e for e in reversed(missing) if e.expert % 2 == 0]
        return Resolution(even, [e for e in missing if e.expert == 1])

    def touch(self, event: LayerEvent, needed: Sequence[ExpertId]) -> None:
        self.told.append(list(needed))


def test_each_missing_expert_is_fetched_computed_in_place_or_left_out() -> None:
    resolver = ByNumber()
    d = direct(4, resolver=resolver)
    carry_out(d, event(0, 0))
    plan = carry_out(d, event(0, 0, 1, 2, 3, 4))
    assert plan.hits == (ExpertId(0, 0),)
    assert [load.expert.expert for load in plan.loads] == [4, 2]
    assert plan.order == (ExpertId(0, 0), ExpertId(0, 4), ExpertId(0, 2))
    assert plan.in_place == (ExpertId(0, 1),)
    assert plan.skipped == (ExpertId(0, 3),)
    assert there(d) == {(0, 0), (0, 2), (0, 4)}  # what is computed in place takes no slot
    c = d.counters
    assert (c.hits, c.misses, c.computed_in_place, c.demand_bytes) == (1, 5, 1, 3 * SIZE)


def test_a_resolver_hears_of_every_event_after_it_was_asked_about_it() -> None:
    resolver = ByNumber()
    d = direct(4, resolver=resolver)
    for e in (event(0, 0), event(0, 0), event(0, 0, 2)):
        carry_out(d, e)
    assert resolver.asked == [([ExpertId(0, 0)], 0), ([ExpertId(0, 2)], 2)]
    assert [len(needed) for needed in resolver.told] == [1, 1, 2]


class InPlace(MissResolver):
    """Everything but expert 9 is computed in place."""

    def resolve(
        self, event: LayerEvent, missing: Sequence[ExpertId], book: Residency
    ) -> Resolution:
        here = [e for e in missing if e.expert != 9]
        return Resolution([e for e in missing if e.expert == 9], here)

    def would_fetch(self, expert: ExpertId) -> bool:
        return expert.expert != 7


def test_those_computed_in_place_follow_after_the_guesses_newest_first() -> None:
    d = direct(3, {1: [guess(2, 0)]}, resolver=InPlace())
    assert foreseen(d, event(0, 0, 7)) == (
        guess(0, 0, 1.0, ahead=LAYERS),
    )  # 7 would not be fetched
    found = foreseen(d, event(1, 1))
    assert found == (guess(2, 0), guess(1, 1, 1.0, ahead=LAYERS), guess(0, 0, 1.0, ahead=LAYERS))
    speculate(d, found[1])
    assert d.place(found[2]) is not None  # under way: it stays wanted, and is not asked for again
    assert foreseen(d, event(3, 9)) == ()
    assert d.wanted(ExpertId(0, 0)) and not d.wanted(ExpertId(1, 1))
    arrive(d, ExpertId(0, 0))
    assert foreseen(d, event(3, 9)) == ()
    assert not d.wanted(ExpertId(0, 0))
    assert d.decide(event(0, 0)).hits == (ExpertId(0, 0),)


def test_a_follower_replaces_nobody_likelier() -> None:
    d = direct(1, evictor="lrfu", resolver=InPlace())
    for step in range(3):
        carry_out(d, event(0, 9, step=step))
    (rare,) = foreseen(d, event(0, 2))
    assert 0 < rare.probability < (d.evictor.chance(ExpertId(0, 9)) or 0)
    assert d.place(rare) is None
    for step in range(20):
        (now_common,) = foreseen(d, event(0, 2, step=step))
    assert d.place(now_common) is not None


def test_only_the_newest_follow() -> None:
    d = direct(2, resolver=InPlace())
    for expert in range(10, 60):
        found = foreseen(d, event(0, expert))
    assert [g.expert.expert for g in found] == list(range(59, 59 - FOLLOWERS, -1))


# -------------------------------------------------------------------------------------------- waves


def test_two_slots_run_eight_experts_and_keep_the_end_of_the_prompt() -> None:
    d = direct(2)
    prompt = LayerEvent(0, 0, Phase.PREFILL, ids=[[0, 1], [2, 3], [4, 5], [6, 7], [0, 4]])
    plan = carry_out(d, prompt)
    assert sorted(x.expert for x in plan.order) == list(range(8))
    assert there(d) == {(0, 0), (0, 4)}  # those of the last token


def test_a_resident_of_the_last_token_outlives_the_waves() -> None:
    d = direct(2)
    carry_out(d, event(0, 7))
    plan = carry_out(d, LayerEvent(0, 0, Phase.PREFILL, ids=[[e] for e in range(8)]))
    assert plan.hits == (ExpertId(0, 7),)
    assert there(d) == {(0, 6), (0, 7)}
    assert d.counters.misses == 1 + 7


def test_a_wave_waits_until_its_victim_was_computed() -> None:
    d = direct(2)
    plan = d.decide(event(0, 0, 1, 2))
    first, second, third = plan.loads
    assert third.victim == ExpertId(0, 0)
    for load in (first, second):
        assert d.may_start(load)
        d.commit(load)
        d.book.pin(load.expert)
    assert not d.may_start(third)
    arrive(d, ExpertId(0, 0))
    assert not d.may_start(third)
    d.book.unpin(ExpertId(0, 0))
    assert d.may_start(third)


@pytest.mark.parametrize("evictor", [n for n in EVICTORS.builtin_names if n != "belady"])
@pytest.mark.parametrize("seed", range(3))
def test_events_of_any_size_run_through_with_any_order_of_arrival(seed: int, evictor: str) -> None:
    dice = random.Random(seed)
    d = direct(dice.choice([2, 3, 5]), evictor=evictor)
    for step in range(60):
        ids = [dice.sample(range(8), 2) for _ in range(dice.choice([1, 1, 2, 9]))]
        e = LayerEvent(step, dice.randrange(LAYERS), Phase.PREFILL, ids=ids)
        plan = carry_out(d, e, dice)
        assert {x.expert for x in plan.order} == {x for row in ids for x in row}
        last = {ExpertId(e.layer, x) for x in ids[-1]}
        assert last <= set(d.book)  # the end of the prompt is there when the answer begins


# ---------------------------------------------------------------------------------- speculation


def test_guesses_worth_issuing_soonest_and_likeliest_first() -> None:
    script = [
        guess(2, 0, 0.9, ahead=2),
        guess(1, 0, 0.5),
        guess(1, 1, 0.8),
        guess(1, 2, 1.0),
        guess(1, 3, 0.49),  # wrong more often than right
    ]
    d = direct(6, {0: script})
    carry_out(d, event(1, 2))  # resident already
    assert foreseen(d, event(0, 0)) == (script[2], script[1], script[0])


def test_what_would_not_be_fetched_is_not_prefetched() -> None:
    class OddOnly(Fetch):
        def would_fetch(self, expert: ExpertId) -> bool:
            return expert.expert % 2 == 1

    d = direct(6, {0: [guess(1, 0), guess(1, 1)]}, resolver=OddOnly())
    assert foreseen(d, event(0, 0)) == (guess(1, 1),)


def test_a_switched_off_predictor_is_not_asked() -> None:
    d = direct(4, {0: [guess(1, 0)]}, speculate=False)
    assert foreseen(d, event(0, 0)) == ()
    assert d.place(guess(1, 0)) is None


def test_a_speculation_takes_a_free_slot_and_is_marked_until_used() -> None:
    d = direct(3, {0: [guess(1, 0)]})
    carry_out(d, event(0, 0))
    slot = d.place(guess(1, 0))
    assert slot is not None
    assert slot.unused
    arrive(d, ExpertId(1, 0))
    assert d.place(guess(1, 0)) is None  # it is there already
    carry_out(d, event(1, 0))
    assert not slot.unused
    c = d.counters
    assert (c.prefetch_issued, c.prefetch_used, c.prefetch_wasted) == (1, 1, 0)
    assert (c.prefetch_bytes, c.demand_bytes, c.hits) == (SIZE, SIZE, 1)


def test_a_guess_that_nobody_makes_any_more_takes_no_slot() -> None:
    d = direct(3, {0: [guess(1, 0)]})
    carry_out(d, event(0, 0))
    carry_out(d, event(1, 5))  # predicts nothing
    assert d.place(guess(1, 0)) is None


def test_speculation_evicts_the_oldest_but_nobody_predicted() -> None:
    d = direct(2, {2: [guess(3, 1), guess(0, 0, ahead=2)]})
    carry_out(d, event(0, 0))
    carry_out(d, event(2, 0))  # predicts (3, 1), and (0, 0) again
    speculate(d, guess(3, 1))
    assert there(d) == {(0, 0), (3, 1)}
    assert d.counters.evictions == 1


def test_a_guess_replaces_nobody_likelier() -> None:
    d = direct(1, {0: [guess(1, 0, 0.06), guess(1, 1, 0.07)]}, evictor="lrfu")
    carry_out(d, event(0, 0))  # used just now: 0.1 x 0.5 + 0.25 x 0.05 + 0.65 x 0.005 = 0.066
    assert d.place(guess(1, 0, 0.06)) is None
    assert d.place(guess(1, 1, 0.07)) is not None


def test_a_speculation_given_up_counts_what_was_read() -> None:
    d = direct(2, {0: [guess(1, 0)]})
    carry_out(d, event(0, 0))
    d.place(guess(1, 0))
    d.book.launch(ExpertId(1, 0))
    d.forget(ExpertId(1, 0), SIZE - 3)
    c = d.counters
    assert (c.prefetch_bytes, c.wasted_bytes, c.prefetch_wasted) == (3, 3, 1)
    d.book.check_integrity(idle=True)


def test_speculation_finds_no_slot_among_the_predicted() -> None:
    d = direct(2, {2: [guess(3, 1), guess(0, 0), guess(1, 0)]})
    carry_out(d, event(0, 0))
    carry_out(d, event(1, 0))
    foreseen(d, event(2, 0))
    assert d.place(guess(3, 1)) is None
    assert there(d) == {(0, 0), (1, 0)}


def test_speculation_evicts_nobody_pinned_or_in_flight() -> None:
    d = direct(2, {0: [guess(1, 0)]})
    plan = d.decide(event(0, 0, 1))
    (first, second) = plan.loads
    d.foresee(plan.event)
    d.commit(first)
    d.commit(second)
    assert d.place(guess(1, 0)) is None  # reserved
    d.book.launch(ExpertId(0, 0))
    d.book.launch(ExpertId(0, 1))
    assert d.place(guess(1, 0)) is None  # in flight
    d.book.pin(ExpertId(0, 0))
    d.book.land(ExpertId(0, 0))
    assert d.place(guess(1, 0)) is None  # pinned
    d.book.unpin(ExpertId(0, 0))
    assert d.place(guess(1, 0)) is not None
    assert there(d) == {(0, 1), (1, 0)}


@pytest.mark.parametrize("evictor", ["lru-global", "lru-layer", "lru", "lfu", "lfru"])
def test_wrong_guesses_leave_before_anybody_useful(evictor: str) -> None:
    d = direct(3, {0: [guess(1, 5)]}, evictor=evictor)
    carry_out(d, event(0, 0))
    speculate(d, guess(1, 5))
    carry_out(d, event(1, 0))  # not 5; full now
    carry_out(d, event(2, 0))
    assert there(d) == {(0, 0), (1, 0), (2, 0)}
    c = d.counters
    assert (c.prefetch_wasted, c.wasted_bytes, c.prefetch_used) == (1, SIZE, 0)


def test_demand_spares_the_predicted_while_there_is_anybody_else() -> None:
    d = direct(2, {1: [guess(0, 0)]})
    carry_out(d, event(0, 0))
    carry_out(d, event(1, 0))  # (0, 0) is older, but predicted
    carry_out(d, event(1, 1))
    assert there(d) == {(0, 0), (1, 1)}
    carry_out(d, event(1, 2, 3))  # needs both slots: demand comes before any guess
    assert there(d) == {(1, 2), (1, 3)}


def test_a_load_may_wait_for_a_speculation_in_flight() -> None:
    d = direct(2, {0: [guess(1, 5)]})
    carry_out(d, event(0, 0))
    assert d.place(guess(1, 5)) is not None
    d.book.launch(ExpertId(1, 5))
    plan = d.decide(event(1, 0, 1))
    assert {load.victim for load in plan.loads} == {ExpertId(0, 0), ExpertId(1, 5)}
    later = next(load for load in plan.loads if load.victim == ExpertId(1, 5))
    assert not d.may_start(later)
    d.book.land(ExpertId(1, 5))
    assert d.may_start(later)


def test_a_load_takes_the_slot_of_a_speculation_that_failed() -> None:
    d = direct(2, {0: [guess(1, 5)]})
    carry_out(d, event(0, 0))
    assert d.place(guess(1, 5)) is not None
    d.book.launch(ExpertId(1, 5))
    plan = d.decide(event(1, 0, 1))
    later = next(load for load in plan.loads if load.victim == ExpertId(1, 5))
    d.forget(ExpertId(1, 5))
    assert d.may_start(later)
    d.commit(later)
    assert d.book.state(later.expert) is State.RESERVED


def test_the_forgotten_can_come_again() -> None:
    d = direct(2)
    (load,) = d.decide(event(0, 0)).loads
    d.commit(load)
    d.book.launch(load.expert)
    d.forget(load.expert)
    assert there(d) == set()
    assert carry_out(d, event(0, 0)).loads == (load,)
    assert list(d.evictor.victims(0, 1)) == [ExpertId(0, 0)]


# ---------------------------------------------------------------------------------- the simulator


@pytest.mark.parametrize("evictor", ["lru", "lru-global", "lfu"])
def test_the_simulator_counts_what_the_runtime_counts(evictor: str) -> None:
    trace = at_random(5, steps=30, layers=LAYERS, experts=8, k=2)
    trace.insert(0, LayerEvent(0, 0, Phase.PREFILL, ids=[[0, 1], [2, 3], [4, 5], [6, 7]]))
    d = direct(6, evictor=evictor)
    for e in trace:
        carry_out(d, e, random.Random(1))
    assert replay(trace, slots=6, layers=LAYERS, evictor=evictor, nbytes=d.nbytes) == d.counters
