"""A device on the CPU whose streams run late, and in any order that the fences between them allow.

What is asked for is only written down. When the host waits for something, the heads of the streams
are run, one after the other, chosen by seeded dice. A recording refuses what a real one refuses:
the host waiting, events from outside, branches that are never joined.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

Work = Callable[[], Any]


class Event:
    def __init__(self, device: Late, tape: list[Any] | None) -> None:
        self.device, self.tape, self.passed = device, tape, False
        self.time = 0.0

    def done(self) -> bool:
        return self.passed

    def synchronize(self) -> None:
        self.device.run_until(self)

    def seconds_since(self, earlier: Event) -> float:
        return self.time - earlier.time


class Stream:
    def __init__(self, device: Late) -> None:
        self.device = device
        self.ahead: deque[tuple[str, Any]] = deque()

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        assert to.shape == source.shape and to.dtype == source.dtype
        kept = source.clone()
        self.ask("run", lambda: to.copy_(kept))

    def wait(self, event: Event) -> None:
        assert event.tape is self.device.tape, "an event from outside of this recording"
        self.ask("wait", event)

    def record(self, *, timed: bool = False) -> Event:
        event = Event(self.device, self.device.tape)
        self.ask("pass", event)
        return event

    def ask(self, what: str, subject: Any) -> None:
        if self.device.tape is None:
            self.ahead.append((what, subject))
        else:
            self.device.tape.append((self, what, subject))

    def __enter__(self) -> Stream:
        self.device.inside.append(self)
        return self

    def __exit__(self, *exc: object) -> None:
        assert self.device.inside.pop() is self


class Graph:
    def __init__(self, device: Late) -> None:
        self.device = device
        self.steps: list[tuple[Stream, str, Any]] = []

    def begin(self) -> None:
        self.device.run_all()
        self.device.tape = self.steps

    def end(self) -> None:
        self.device.tape = None
        for stream in {s for s, _, _ in self.steps} - {self.device.main}:
            last = [(what, subject) for s, what, subject in self.steps if s is stream][-1]
            joined = (self.device.main, "wait", last[1]) in self.steps
            assert last[0] == "pass" and joined, "a branch of the recording is never joined"

    def replay(self) -> None:
        fresh: dict[int, Event] = {}
        for stream, what, subject in self.steps:
            if isinstance(subject, Event):
                subject = fresh.setdefault(id(subject), Event(self.device, None))
            stream.ask(what, subject)


class Late:
    """See `understudy.experts.device.Device`."""

    index, name = 0, "a device that runs late"
    torch_device = torch.device("cpu")

    def __init__(self, seed: int = 0) -> None:
        self.dice = random.Random(seed)
        self.tape: list[Any] | None = None
        self.main = Stream(self)
        self.streams = [self.main]
        self.inside = [self.main]
        self.ran: list[str] = []  # kernels, in the order in which they ran
        self.clock = 0.0

    @property
    def compute(self) -> Stream:
        return self.inside[-1]

    def stream(self, *, urgent: bool = False) -> Stream:
        self.streams.append(Stream(self))
        return self.streams[-1]

    def free_bytes(self) -> int:
        return 1 << 30

    def total_bytes(self) -> int:
        return 1 << 30

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Full of what nobody may rely on."""
        memory = torch.full((nbytes + 256,), 0x5A, dtype=torch.uint8)
        return memory[-memory.data_ptr() % 256 :][:nbytes]

    def pin(self, nbytes: int) -> torch.Tensor:
        return self.allocate(nbytes)

    def unpin(self, memory: torch.Tensor) -> None:
        pass

    def graph(self, shares: Graph | None = None) -> Graph:
        return Graph(self)

    def later(self, work: Work) -> None:
        self.compute.ask("run", work)

    def launch(self, kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
        def run() -> None:
            self.ran.append(kernel.fn.__name__)
            kernel[tuple(grid)](*args, **options)

        self.later(run)

    def fetch(self, *tensors: torch.Tensor) -> list[Any]:
        self.compute.record().synchronize()
        return [t.tolist() for t in tensors]

    def reads(self, memory: torch.Tensor) -> None:
        pass

    # ------------------------------------------------------------------------------- running late

    def run_until(self, event: Event) -> None:
        assert self.tape is None, "the host waits inside a recording"
        while not event.passed:
            self._step()

    def run_all(self) -> None:
        while any(s.ahead for s in self.streams):
            self._step()

    def _step(self) -> None:
        able = [s for s in self.streams if s.ahead and not self._blocked(s)]
        what, subject = self.dice.choice(able).ahead.popleft()
        if what == "run":
            subject()
        elif what == "pass":
            subject.passed, subject.time = True, self.clock

    @staticmethod
    def _blocked(stream: Stream) -> bool:
        what, subject = stream.ahead[0]
        return what == "wait" and not subject.passed
