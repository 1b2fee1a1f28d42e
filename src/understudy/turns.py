"""Host and device take turns at deciding who is in the slots.

Knows: the runtime, in which the host decides; `Driven`, in which the device does; the recorded
decode step of each. Does not know: how either decides, or what a step computes.

Prompts are the host's: their events are large, and policies want to see them. So is everything that
no recorded step fits. The next token of a sequence may be the device's. Whoever's turn it is takes
over the slots with those who are in them; nothing is copied for that.

Which of the two answers tokens sooner depends on the machine, the budget and the text. Where nobody
has said, both are timed on the first tokens of real use, in turns, and the faster one stays.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch

from understudy.captured import Kept, Step
from understudy.core import Counters, Forward
from understudy.experts.device.driven import Driven
from understudy.experts.device.slots import DeviceSlots
from understudy.experts.interrupts import Deferred
from understudy.experts.runtime import Runtime

BLOCK = 16  # tokens in a row, the first of which pays for the handover and is not timed
WARM_UP = 2  # blocks, one each, that are not timed
ENOUGH = 42  # timed tokens of each

HOST, DEVICE = "host", "device"


class Choice:
    """Whose turn it is: ``asked``, or (``auto``) whoever answers tokens sooner."""

    def __init__(self, asked: str) -> None:
        self.chosen = None if asked == "auto" else asked
        self.seconds: dict[str, list[float]] = {HOST: [], DEVICE: []}
        self._tokens = 0
        self._last = 0.0

    def next(self, now: float) -> str:
        """Who answers the token that is asked for at ``now`` [seconds]."""
        if self.chosen is not None:
            return self.chosen
        block, place = divmod(self._tokens, BLOCK)
        if block >= WARM_UP and place > 1:
            self.seconds[self._turn(block)].append(now - self._last)
            self._decide()
        self._tokens, self._last = self._tokens + 1, now
        return self._turn(block)

    def pause(self) -> None:
        """A request is over: the next one begins a block."""
        self._tokens = -(-self._tokens // BLOCK) * BLOCK

    def _decide(self) -> None:
        if all(len(seconds) >= ENOUGH for seconds in self.seconds.values()):
            self.chosen = min((HOST, DEVICE), key=lambda who: median(self.seconds[who]))

    @staticmethod
    def _turn(block: int) -> str:
        return DEVICE if block % 2 else HOST


class Rows:
    """`Driven` as a seam that may be recorded. A step is rehearsed with a short prompt: its tokens
    are asked about one at a time, because slots are planned for one."""

    capturable = True

    def __init__(self, driven: Driven) -> None:
        self._driven = driven

    def __call__(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        if len(hidden) == 1:
            return self._driven(layer, hidden, ids, weights)
        rows = [slice(t, t + 1) for t in range(len(hidden))]
        return torch.cat([self._driven(layer, hidden[t], ids[t], weights[t]) for t in rows])

    def begin(self, forward: Forward) -> None: ...
    def end(self, forward: Forward) -> None: ...


class Turns:
    """Before a model, in place of one recorded step: see `model.Captured`."""

    def __init__(
        self, runtime: Runtime, slots: DeviceSlots, driven: Driven, by_host: Step, by_device: Step,
        asked: str,
    ) -> None:  # fmt: skip
        self.runtime, self.slots, self.driven = runtime, slots, driven
        self.steps = {HOST: by_host, DEVICE: by_device}
        self.choice = Choice(asked)
        self._on_device = False
        self._rehearsed = driven.counters()
        runtime.claim = self._to_host

    @contextmanager
    def lend(self) -> Iterator[Kept | None]:
        """Both steps share one cache."""
        with self.steps[HOST].lend() as cache:
            self.choice.pause()
            yield cache

    def applies(self, kwargs: Mapping[str, Any]) -> bool:
        return self.steps[HOST].applies(kwargs)

    def __call__(self, kwargs: Mapping[str, Any]) -> Any:
        runtime = self.runtime
        watched = (runtime.recording, runtime.watch, runtime.tap) != (None, None, None)
        if watched or self.choice.next(time.perf_counter()) == HOST:
            return self.steps[HOST](kwargs)
        # No event of another forward in between, and no Ctrl-C: the slots have one owner.
        with Deferred(), self.runtime.section:
            self.runtime.transfer.require_open()
            self._to_device()
            return self.steps[DEVICE](kwargs)

    @property
    def counters(self) -> Counters:
        """What the device has counted, rehearsals left out; the host waits for it."""
        found = self.driven.counters() - self._rehearsed
        found.tokens = self.steps[DEVICE].steps
        return found

    @property
    def now(self) -> str:
        return self.choice.chosen or "host and device in turns, until one is known to be faster"

    def _to_device(self) -> None:
        if self._on_device:
            return
        director = self.runtime.director
        with self.runtime._lock:
            self.runtime.transfer.settle()
            self.slots.settle()
            free = [slot.index for slot in director.book.slots if slot.expert is None]
            self.driven.adopt(director.residents(), free)
        self._on_device = True

    def _to_host(self) -> None:
        if not self._on_device:
            return
        residents = self.driven.give_back()
        with self.runtime._lock:
            self.runtime.director.take_over(residents)
        self.slots.seated(residents)
        self._on_device = False
