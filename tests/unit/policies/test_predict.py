"""Predictors: who they guess, how sure they are, and the switch that silences them."""

from __future__ import annotations

import random

import pytest
from unit.policies.traces import event

from understudy.core import ExpertId, Guess, LayerEvent, Phase
from understudy.policies import Predictor
from understudy.policies.predict import LastToken, NextGate, Popularity, SelfSwitch
from understudy.registry import PREDICTORS


def told(layer: int, **lookahead: list[list[int]]) -> LayerEvent:
    """An event of ``layer`` with answers of later routers: ``l3=[[ids of a token], ...]``."""
    answers = {
        int(name[1:]): (ids, [[1.0] * len(row) for row in ids]) for name, ids in lookahead.items()
    }
    return LayerEvent(0, layer, Phase.DECODE, ids=[[0]], lookahead=answers)


def who(guesses: list[Guess]) -> list[tuple[int, int]]:
    return [tuple(g.expert) for g in guesses]


# ----------------------------------------------------------------------------------------- who


def test_nobody_is_guessed_by_none() -> None:
    silent = PREDICTORS.get("none")(layers=2, experts=[4, 4])
    assert silent.predict(event(0, 1)) == []
    assert silent.lookahead == 0


def test_last_token_repeats_the_next_layer_of_the_previous_token() -> None:
    p = LastToken(layers=3, experts=[4] * 3)
    for layer, experts in enumerate([(0, 1), (2, 3), (1, 3)]):
        p.observe(event(layer, *experts))
    assert who(p.predict(event(0, 0, 1))) == [(1, 2), (1, 3)]
    assert who(p.predict(event(2, 1, 3))) == [(0, 0), (0, 1)]  # the next token's first layer


def test_last_token_follows_the_end_of_a_prompt_and_looks_deeper_if_asked() -> None:
    p = LastToken(layers=3, experts=[4] * 3, depth=2)
    prompt = LayerEvent(0, 1, Phase.PREFILL, ids=[[0, 1], [2, 3]])
    p.observe(prompt)
    p.observe(event(2, 0))
    guesses = p.predict(event(0, 0))
    assert [(tuple(g.expert), g.layers_until) for g in guesses] == [
        ((1, 2), 1),
        ((1, 3), 1),
        ((2, 0), 2),
    ]


def test_popularity_names_the_most_used_and_never_the_unused() -> None:
    p = Popularity(layers=2, experts=[4, 4])
    for experts in [(2, 0), (2, 3), (2, 3)]:
        p.observe(event(1, *experts))
    assert who(p.predict(event(0, 0, 1))) == [(1, 2), (1, 3)]
    assert who(p.predict(event(0, 0, 1, 2, 3))) == [(1, 2), (1, 3), (1, 0)]


def test_next_gate_asks_for_as_many_routers_as_it_looks_ahead() -> None:
    assert NextGate(layers=4, experts=[4] * 4, depth=2).lookahead == 2
    assert LastToken(layers=4, experts=[4] * 4, depth=2).lookahead == 0


def test_next_gate_says_what_the_routers_said() -> None:
    p = NextGate(layers=4, experts=[4] * 4, depth=2)
    guesses = p.predict(told(1, l2=[[3, 0]], l3=[[1, 2]]))
    assert [(tuple(g.expert), g.layers_until) for g in guesses] == [
        ((2, 3), 1),
        ((2, 0), 1),
        ((3, 1), 2),
        ((3, 2), 2),
    ]
    assert p.predict(told(3)) == []


def test_in_a_prompt_an_expert_counts_by_its_best_rank_and_once() -> None:
    p = NextGate(layers=2, experts=[4, 4])
    for _ in range(30):  # first choices come true, second ones never do
        p.predict(told(0, l1=[[0, 1]]))
        p.observe(event(1, 0))
    guesses = p.predict(told(0, l1=[[0, 2], [2, 0], [1, 3]]))
    assert sorted(who(guesses)) == [(1, 0), (1, 1), (1, 2), (1, 3)]
    sure = {g.expert.expert for g in guesses if g.probability > 0.9}
    assert sure == {0, 1, 2}


# ------------------------------------------------------------------------------------- how sure


@pytest.mark.parametrize("name", ["last-token", "popularity", "next-gate"])
def test_without_experience_a_guess_is_a_coin(name: str) -> None:
    p: Predictor = PREDICTORS.get(name)(layers=2, experts=[4, 4])
    p.observe(event(1, 2))
    e = told(0, l1=[[2]])
    p.observe(e)
    assert [g.probability for g in p.predict(e)] == [0.5]


def test_probabilities_are_counted_per_rank_and_distance() -> None:
    p = NextGate(layers=3, experts=[4] * 3, depth=2)
    for _ in range(20):
        p.predict(told(0, l1=[[0, 1]], l2=[[2, 3]]))
        p.observe(event(1, 0, 2))  # rank 0 right, rank 1 wrong, one layer on
        p.observe(event(2, 3, 1))  # the other way round, two layers on
    found = {
        (g.layers_until, g.expert.expert): g.probability
        for g in p.predict(told(0, l1=[[0, 1]], l2=[[2, 3]]))
    }
    right, wrong = pytest.approx(21 / 22), pytest.approx(1 / 22)
    assert found == {(1, 0): right, (1, 1): wrong, (2, 2): wrong, (2, 3): right}


def test_in_the_long_run_a_probability_is_a_frequency() -> None:
    dice = random.Random(7)
    p = NextGate(layers=2, experts=[8, 8])
    said: list[float] = []
    for i in range(2000):
        (guess,) = p.predict(told(0, l1=[[3]]))
        p.observe(event(1, 3 if dice.random() < 0.7 else 4))
        if i > 200:
            said.append(guess.probability)
    assert sum(said) / len(said) == pytest.approx(0.7, abs=0.03)
    assert all(0.5 < probability < 0.9 for probability in said)


def test_an_old_reputation_fades() -> None:
    p = NextGate(layers=2, experts=[8, 8])

    def sure(rounds: int, truth: int) -> float:
        for _ in range(rounds):
            p.predict(told(0, l1=[[3]]))
            p.observe(event(1, truth))
        return p.predict(told(0, l1=[[3]]))[0].probability

    assert sure(5000, truth=3) > 0.99
    assert sure(600, truth=4) < 0.2


def test_an_event_without_an_open_guess_teaches_nothing() -> None:
    p = NextGate(layers=2, experts=[4, 4])
    for _ in range(50):
        p.observe(event(1, 2))
    assert p.predict(told(0, l1=[[3]])) == [Guess(ExpertId(1, 3), 0.5, 1)]


def test_what_was_resident_when_it_was_guessed_teaches_nothing() -> None:
    p = NextGate(layers=3, experts=[4] * 3, depth=2)
    for _ in range(8):  # right about residents, wrong about the others
        guesses = p.predict(told(0, l1=[[1, 2]], l2=[[1, 2]]))
        p.resident([g for g in guesses if g.expert.expert == 1])
        p.observe(LayerEvent(0, 1, Phase.DECODE, ids=[[1, 3]]))
        p.observe(LayerEvent(0, 2, Phase.DECODE, ids=[[1, 3]]))
    assert [g.probability for g in p.predict(told(0, l1=[[1, 2]], l2=[[1, 2]]))] == [
        0.5, 0.1, 0.5, 0.1
    ]  # fmt: skip


# ----------------------------------------------------------------------------------- the switch

WARM_UP = SelfSwitch.WARM_UP
TRIAL = WARM_UP + SelfSwitch.BLOCK * SelfSwitch.BLOCKS


def drive(switch: SelfSwitch, steps: int, on: float, off: float) -> list[bool]:
    """``steps`` decode steps that take ``on`` or ``off`` seconds; whether each one speculated."""
    history = []
    for _ in range(steps):
        history.append(switch.on)
        switch.record(on if switch.on else off)
    return history


def test_a_trial_alternates_whole_blocks() -> None:
    b = SelfSwitch.BLOCK
    history = drive(SelfSwitch(), TRIAL, on=1.0, off=1.0)
    blocks = ([False] * b + [True] * b) * (SelfSwitch.BLOCKS // 2)
    assert history == [True] * WARM_UP + blocks


def test_a_cold_cache_is_blamed_on_nobody() -> None:
    switch = SelfSwitch()
    drive(switch, WARM_UP, on=100.0, off=100.0)
    drive(switch, TRIAL - WARM_UP, on=1.0, off=1.1)
    assert switch.on


@pytest.mark.parametrize(
    ("on", "off", "stays"),
    [(1.0, 2.0, True), (2.0, 1.0, False), (1.0, 1.0, True), (1.01, 1.0, True), (1.03, 1.0, False)],
)
def test_it_stays_on_unless_that_is_slower_and_tries_again_later(
    on: float, off: float, stays: bool
) -> None:
    switch = SelfSwitch()
    drive(switch, TRIAL, on, off)
    rest = SelfSwitch.REST if stays else SelfSwitch.REST_OFF
    assert set(drive(switch, rest, on, off)) == {stays}
    b = SelfSwitch.BLOCK
    next_trial = [True] * WARM_UP + [False] * b + [True] * b
    assert drive(switch, WARM_UP + 2 * b, on, off) == next_trial


def test_a_later_trial_judges_by_itself() -> None:
    switch = SelfSwitch()
    drive(switch, TRIAL + SelfSwitch.REST_OFF, on=5.0, off=4.0)
    drive(switch, TRIAL, on=2.0, off=3.0)  # now it pays, though 5, 4 and 2, 3 together say no
    assert set(drive(switch, SelfSwitch.REST, on=2.0, off=3.0)) == {True}


def test_one_slow_step_decides_nothing() -> None:
    switch = SelfSwitch()
    for step in range(TRIAL):
        hiccup = switch.on and (step - WARM_UP) % SelfSwitch.BLOCK == 5
        switch.record(100.0 if hiccup else 1.0 if switch.on else 2.0)
    assert switch.on


def test_the_first_steps_of_a_block_belong_to_the_block_before() -> None:
    switch = SelfSwitch()
    for step in range(TRIAL):
        echo = 9.0 if switch.on else 0.0  # counted, these few would tip the medians
        honest = (1.0 if switch.on else 1.2) + 0.5 * (step % 2)
        settling = (step - WARM_UP) % SelfSwitch.BLOCK < SelfSwitch.SETTLE
        switch.record(echo if settling else honest)
    assert switch.on


def test_who_may_not_switch_does_not() -> None:
    assert set(drive(SelfSwitch(adaptive=False), 2 * TRIAL, on=9.0, off=1.0)) == {True}
    assert set(drive(SelfSwitch(enabled=False), 2 * TRIAL, on=1.0, off=9.0)) == {False}
