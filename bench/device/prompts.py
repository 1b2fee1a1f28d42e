"""A prompt of 2,048 tokens: how long until the first token, ours beside accelerate's?

Knows: who plays, in turns, and what one pass over the experts is. Does not know: decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from bench import contest
from bench.device import adapter
from bench.device.adapter import Spot
from bench.device.play import Responsible, Seat, forget, head_of
from bench.device.players import Own, Peer, Player, why_not
from bench.device.subjects import Subject
from bench.device.ways import Way
from understudy.experts.device import Device

TOKENS = 2048
Row = dict[str, Any]


def play(
    subject: Subject, percent: int, ways: Sequence[Way], spot: Spot, device: Device | None,
    emit: Callable[[Row], None], tokens: int = TOKENS, rounds: int = 5,
) -> None:  # fmt: skip
    """A row for each of ``ways``. The first round warms up and is not counted."""
    assert subject.folder is not None, "the peer loads a folder"
    course = contest.texts(subject.folder, rounds + 1, tokens, 1)
    asked = replace(subject, prompts=course.prompts, answers=course.answers)
    seats = [Seat(way, failed=why_not(way, subject, spot)) for way in ways]
    once: dict[str, int] = {}
    with ExitStack() as stack:
        for seat in (seat for seat in seats if seat.failed is None):
            emit({"began": seat.way.name})
            with Responsible(seat, device):
                seat.player = _open(asked, seat.way, percent, spot, device, tokens)
                stack.callback(seat.close)
        for number in range(len(course.prompts)):
            for seat in seats:
                with Responsible(seat, device):
                    _round(seat, number)
        for seat in seats:
            with Responsible(seat, device):
                if isinstance(seat.player, Own):
                    touched = adapter.routed(seat.player.engine, course.prompts[-1])
                    once[seat.way.name] = len(touched) * subject.facts.expert_bytes
            row = head_of(subject, seat.way, percent)
            row |= {"skipped": seat.failed, "turns": seat.turns}
            emit(row | {"once_bytes": once.get(seat.way.name)})
    forget(device)


def _round(seat: Seat, number: int) -> None:
    if seat.player is not None:
        found = seat.player.answer(number)
        if number > 0:
            seat.turns.append(found.turn.as_dict())


def _open(
    subject: Subject, way: Way, percent: int, spot: Spot, device: Device | None, tokens: int
) -> Player:
    if way.peer:
        return Peer(subject, percent)
    # The whole prompt in one forward: each expert is then brought once.
    settings = {"max_context": tokens + 64, "prefill_chunk_size": tokens}
    return Own(subject, way, percent, spot, device, **settings)
