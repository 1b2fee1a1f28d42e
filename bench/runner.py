"""What a contestant must be able to do, and the clock that all but Understudy share.

Knows: the interface, how one round is timed, where the kernel says what a process has read. Does
not know: any contestant.

    load(model, memory, options) -> facts about the load
    round(prompt, answer, seconds) -> `Lap` as a dict: read the prompt, then continue it with the
                                      given tokens, so that everybody computes on the same text
    imports()                         what it imports only when it loads
    close()

A lap counts ``len(answer)`` tokens: the first follows from the prompt (TTFT), the others from one
step each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

FEWEST_STEPS = 2  # a contestant that runs out of time still makes this many


@dataclass(frozen=True, slots=True)
class Lap:
    """One round. Seconds; bytes of one whole phase. ``None``: this contestant cannot say.

    ``needed_bytes``: what decode read less what turned out useless; ``memory_bytes``: what decode
    read from memory, at least; ``best_bytes``: what a clairvoyant with the same slots would have
    read in decode. ``prompt_once_bytes``: the experts the prompt touched, each once.
    ``link_rate``: bytes per second while anything was read, in the whole round.
    """

    ttft: float
    seconds: float
    steps: int
    read_bytes: int | None = None
    needed_bytes: int | None = None
    memory_bytes: int | None = None
    best_bytes: int | None = None
    lookups: int | None = None
    hits: int | None = None
    late: int | None = None
    stall_seconds: float | None = None
    prompt_read_bytes: int | None = None
    prompt_once_bytes: int | None = None
    prompt_stall_seconds: float | None = None
    link_rate: float | None = None
    guesses: tuple[int, ...] = ()  # the token it would have chosen, at each place

    @property
    def tpot(self) -> float:
        return self.seconds / self.steps if self.steps else 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Runner(Protocol):
    """One contestant, in a process of its own."""

    @staticmethod
    def imports() -> None: ...

    def load(self, model: str, memory: int | None, options: dict[str, Any]) -> dict[str, Any]: ...

    def round(self, prompt: Sequence[int], answer: Sequence[int], seconds: float) -> Lap: ...

    def close(self) -> None: ...


def step_through(
    read_prompt: Callable[[Sequence[int]], int],
    step: Callable[[int], int],
    prompt: Sequence[int],
    answer: Sequence[int],
    seconds: float,
) -> Lap:
    """Time a contestant that can be driven token by token.

    ``read_prompt`` and ``step`` return the token that the contestant would choose next. Stops early
    when ``seconds`` of decoding have passed.
    """
    before, started = disk_bytes(), time.perf_counter()
    guesses = [read_prompt(prompt)]
    first, between = time.perf_counter(), disk_bytes()
    last = first
    for token in answer[:-1]:
        if len(guesses) > FEWEST_STEPS and last - first > seconds:
            break
        guesses.append(step(token))
        last = time.perf_counter()
    after = disk_bytes()
    return Lap(
        ttft=first - started,
        seconds=last - first,
        steps=len(guesses) - 1,
        read_bytes=_difference(between, after),
        needed_bytes=_difference(between, after),
        prompt_read_bytes=_difference(before, between),
        guesses=tuple(guesses),
    )


def _difference(before: int | None, after: int | None) -> int | None:
    return None if before is None or after is None else after - before


def disk_bytes() -> int | None:
    """Bytes that the storage was asked for on behalf of this process, page faults included."""
    return _proc("io", "read_bytes:")


def peak_resident_bytes() -> int | None:
    kilobytes = _proc("status", "VmHWM:")
    return None if kilobytes is None else kilobytes * 1024


def _proc(file: str, key: str) -> int | None:
    try:
        text = Path(f"/proc/self/{file}").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    return None
