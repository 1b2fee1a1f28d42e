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
from bench.device.players import Own, Peer
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
    with ExitStack() as stack:
        players: dict[str, tuple[Way, Any]] = {}
        for way in ways:
            reason = _why_not(way, spot)
            if reason:
                emit(_row(subject, way, percent, skipped=reason))
                continue
            emit({"began": way.name})
            player = _open(asked, way, percent, spot, device, tokens)
            stack.callback(player.close)
            players[way.name] = way, player
        turns: dict[str, list[Row]] = {name: [] for name in players}
        for number, prompt in enumerate(course.prompts):
            for name, (way, player) in players.items():
                found = player.read(prompt) if way.peer else player.answer(number)
                if number > 0:
                    turns[name].append(found.turn.as_dict())
        for name, (way, player) in players.items():
            once = None
            if not way.peer:
                touched = adapter.routed(player.engine, course.prompts[-1])
                once = len(touched) * subject.facts.expert_bytes
            emit(_row(subject, way, percent, turns=turns[name], once_bytes=once))


def _open(
    subject: Subject, way: Way, percent: int, spot: Spot, device: Device | None, tokens: int
) -> Own | Peer:
    if way.peer:
        return Peer(subject, percent)
    # The whole prompt in one forward: each expert is then brought once.
    settings = {"max_context": tokens + 64, "prefill_chunk_size": tokens}
    return Own(subject, way, percent, spot, device, **settings)


def _why_not(way: Way, spot: Spot) -> str | None:
    if way.peer:
        return None if spot.accelerated else "needs an accelerator"
    return adapter.lacking(way, spot)


def _row(subject: Subject, way: Way, percent: int, **more: Any) -> Row:
    return {
        "model": subject.name,
        "budget_fraction": percent / 100,
        "contestant": way.name,
        "promise": way.promise,
        **more,
    }
