"""Which tokens form a step: hand-known schedules, and a seeded search for a row that starves."""

from __future__ import annotations

import random

from batch.fake_seats import FakeSeats

from understudy.batch import Row
from understudy.batch.schedule import Entry, Scheduler


def entry(name: str, tokens: int, *, answers: bool = True, every: bool = False) -> Entry:
    return Entry(Row(name, [1] * tokens), answers, every)


def scheduler(seats: FakeSeats, *, rows: int = 4, tokens: int = 16, every: int = 1000):
    return Scheduler(seats, max_rows=rows, max_tokens=tokens, max_every=every)


def step(s: Scheduler) -> list[tuple[str, int, str]]:
    """One step; whoever got a last logit is given its next token."""
    chunks = s.next()
    if chunks:
        s.seats.forward(chunks)
    for chunk in chunks:
        if chunk.row.done == len(chunk.row.tokens):
            chunk.row.tokens.append(1)
    return [(c.row.id, c.count, c.logits) for c in chunks]


def test_a_long_prompt_comes_in_chunks_beside_answers() -> None:
    s = scheduler(FakeSeats())
    s.add(entry("short", 3))
    assert step(s) == [("short", 3, "last")]
    s.add(entry("long", 40))
    assert step(s) == [("short", 1, "last"), ("long", 15, "none")]
    assert step(s) == [("short", 1, "last"), ("long", 15, "none")]
    assert step(s) == [("short", 1, "last"), ("long", 10, "last")]
    assert step(s) == [("short", 1, "last"), ("long", 1, "last")]


def test_no_more_rows_than_allowed_and_first_come_first_served() -> None:
    s = scheduler(FakeSeats(), rows=2)
    entries = [entry(name, 2) for name in "abc"]
    for e in entries:
        s.add(e)
    assert [name for name, *_ in step(s)] == ["a", "b"]
    s.remove(entries[0])
    assert [name for name, *_ in step(s)] == ["b", "c"]


def test_a_prompt_that_cannot_be_cut_comes_whole_though_it_exceeds_the_step() -> None:
    s = scheduler(FakeSeats(whole_prompts=True))
    s.add(entry("a", 2))
    step(s)
    s.add(entry("b", 40))
    s.add(entry("c", 40))
    assert step(s) == [("a", 1, "last"), ("b", 40, "last")]
    assert step(s) == [("a", 1, "last"), ("b", 1, "last"), ("c", 40, "last")]


def test_logits_of_every_position_are_limited_by_their_memory() -> None:
    s = scheduler(FakeSeats(), every=6)
    s.add(entry("a", 8, every=True))
    s.add(entry("b", 8, every=True))
    assert step(s) == [("a", 6, "all")]
    assert step(s) == [("a", 2, "all"), ("b", 4, "all")]


def test_who_waits_only_comes_in_when_the_whole_prompt_finds_room() -> None:
    s = scheduler(FakeSeats(capacity=60))
    s.add(entry("a", 20))
    s.add(entry("b", 30))  # 20 + 30 + headroom for a
    assert step(s) == [("a", 16, "none")]
    assert step(s) == [("a", 4, "last")]


def test_the_youngest_makes_room_and_starts_over_with_its_answer() -> None:
    seats = FakeSeats(capacity=40)
    s = scheduler(seats, tokens=64)
    s.add(entry("old", 6))
    s.add(entry("young", 6))
    for _ in range(14):
        step(s)
    assert {row.id: len(row.tokens) for row in seats.held} == {"old": 20, "young": 20}
    step(s)
    assert step(s)[0] == ("old", 1, "last")
    while s.preemptions == 0:
        step(s)
    assert [e.row.id for e in s.running] == ["old"]
    assert s.waiting[0].row.id == "young"
    known = len(s.waiting[0].row.tokens)
    s.remove(s.running[0])
    assert step(s) == [("young", known, "last")]


def test_everybody_gets_through_whatever_comes() -> None:
    dice = random.Random(7)
    for _ in range(200):
        seats = FakeSeats(capacity=dice.randrange(40, 200), whole_prompts=dice.random() < 0.3)
        s = scheduler(seats, rows=dice.randrange(1, 6), tokens=dice.randrange(1, 30))
        wanted = {}
        for name in range(dice.randrange(1, 12)):
            prompt, new = dice.randrange(1, 20), dice.randrange(1, 20)
            wanted[f"{name}"] = prompt + new
            s.add(entry(f"{name}", prompt))
        for _ in range(2000):
            if not (s.running or s.waiting):
                break
            assert step(s), "rows are there and nobody moves"
            assert seats.used <= seats.capacity
            for e in list(s.running):
                if len(e.row.tokens) >= wanted[e.row.id]:
                    s.remove(e)
        assert not s.running and not s.waiting and not seats.held
