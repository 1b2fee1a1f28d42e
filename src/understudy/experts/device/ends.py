"""How fast a miss is served at either end: carried to the device, or computed where it lies.

Knows: a device in the words of `Device`, something that computes experts on the processor, a clock.
Does not know: models, or what is made of the answer (`policies.resolve`).

Link and processor read the same memory, so each is timed alone and then both at once. Copies are of
one expert each, from ever other places: what a cache holds would come too fast.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, prod
from statistics import median
from typing import Protocol

import torch
from transformers.activations import SiLUActivation
from transformers.integrations.moe import _default_apply_gate

from understudy import native
from understudy.core import ByteRange, ExpertLayout, Piece
from understudy.experts import kernels
from understudy.experts.compute import ExpertMlp
from understudy.experts.device import Device, Event, Stream
from understudy.policies.resolve import Ends

MIB = 1 << 20
COLD = 256 * MIB  # of host memory that copies come from in turn
QUEUED = 512  # copies asked for at once: drivers make the host wait behind about a thousand
SECONDS = 0.15  # of each measurement
TRIES = 3
WARM_UP = 2  # copies before the clock starts
FEW, MORE = 1, 4  # tokens of an expert, between which a line is drawn
TOGETHER = 4  # experts that the processor computes in one call
ACTIVATIONS = 8 << 10  # bytes of one token's, at most
ROUNDS = 9  # of what takes microseconds
TIMES_FASTER = 1000  # further tokens that take no time that can be measured

Clock = Callable[[], float]

# An expert of Qwen3-30B-A3B, 9.4 MB: what a processor is tried with where no model was named.
HIDDEN, WIDTH = 2048, 768
CROWD_BYTES = 512 * MIB  # more than the caches of large processors hold


class _Swiglu:
    """What `ExpertMlp` asks of an Experts module of transformers."""

    is_transposed, has_gate, has_post_expert_norm = False, True, False
    act_fn = SiLUActivation()
    _apply_gate = _default_apply_gate


def typical(cold_bytes: int = CROWD_BYTES) -> kernels.Crowd:
    """Experts as many models have them, with the kernel that is quicker now: a choice that is kept
    is left to loads."""
    matrices = {"gate_up_proj": (2 * WIDTH, HIDDEN), "down_proj": (HIDDEN, WIDTH)}
    params, start = {}, 0
    for name, shape in matrices.items():
        params[name] = (Piece(0, start, "bfloat16", shape, (shape[1], 1)),)
        start += 2 * prod(shape)
    layout = ExpertLayout((ByteRange(0, 0, start),), params)
    mlp = ExpertMlp(_Swiglu())
    most = 1 + cold_bytes // start
    crowd = kernels.Crowd(mlp, layout, torch.bfloat16, cold_bytes=cold_bytes, most=most)
    ways = (0,) if native.library() is None else (0, kernels.NATIVE_ROWS)
    mlp.native_rows = max(ways, key=lambda rows: _rate_with(crowd, rows))
    return crowd


def _rate_with(crowd: kernels.Crowd, native_rows: int) -> float:
    crowd.mlp.native_rows = native_rows
    return _rate(crowd, FEW, time.perf_counter, SECONDS)


class Work(Protocol):
    """Experts for the processor, as many as no cache holds. `experts.kernels.Crowd` is one."""

    expert_bytes: int

    def compute(self, rows: int, together: int) -> int:
        """Compute so many experts for ``rows`` tokens each; the bytes of their weights."""


@dataclass(frozen=True, slots=True)
class Host:
    """The processor alone: ``bandwidth`` and ``further`` as in `core.Costs`."""

    bandwidth: float
    further: float


def host(work: Work, clock: Clock = time.perf_counter, seconds: float = SECONDS) -> Host:
    """The processor's line through one token and a few."""
    work.compute(FEW, TOGETHER)
    work.compute(MORE, TOGETHER)
    one, several = (_rate(work, rows, clock, seconds) for rows in (FEW, MORE))
    per_token = (1 / several - 1 / one) / (MORE - FEW)  # seconds per byte
    return Host(one, 1 / max(per_token, 1 / (TIMES_FASTER * one)))


def _rate(work: Work, rows: int, clock: Clock, seconds: float) -> float:
    """The best of a few tries: what disturbs a processor only slows it."""
    return max(_once(work, rows, clock, seconds / TRIES) for _ in range(TRIES))


def _once(work: Work, rows: int, clock: Clock, seconds: float) -> float:
    began, nbytes, passed = clock(), 0, 0.0
    while passed < seconds:
        nbytes += work.compute(rows, TOGETHER)
        passed = clock() - began
    return nbytes / passed


def both(
    device: Device, work: Work, clock: Clock = time.perf_counter, seconds: float = SECONDS
) -> Ends:
    """Both ends of ``device``, alone and beside each other. Takes `COLD` bytes of host memory,
    ordinary first and then pinned, and one expert's room on the device. Raises `PinningRefused`,
    `DeviceFull`."""
    alone, size = host(work, clock, seconds), max(COLD, work.expert_bytes)
    to = device.allocate(work.expert_bytes)
    pageable = _Copies(device, torch.ones(size, dtype=torch.uint8), to).rate(seconds)
    with _pinned(device, size) as memory:
        copies = _Copies(device, memory, to)
        link = copies.rate(seconds)
        link_beside, host_beside = _beside(copies, copies.count(link, seconds), work, clock)
        handover = _handover(device, memory, to, clock)
    return Ends(link, alone.bandwidth, link_beside, host_beside, pageable, alone.further, handover)


@contextmanager
def _pinned(device: Device, nbytes: int) -> Iterator[torch.Tensor]:
    memory = device.pin(nbytes)
    try:
        memory.fill_(1)  # pages that were never written may all be one
        yield memory
    finally:
        device.unpin(memory)


class _Copies:
    """Copies to one expert's place on the device, from ever other places of ``memory``."""

    def __init__(self, device: Device, memory: torch.Tensor, to: torch.Tensor) -> None:
        self.stream: Stream = device.stream()
        self.to, self.nbytes = to, to.numel()
        self._parts = memory[: memory.numel() // self.nbytes * self.nbytes].view(-1, self.nbytes)

    def start(self, count: int) -> tuple[Event, Event]:
        """Ask for ``count`` copies: the events before and after them."""
        before = self.stream.record(timed=True)
        for i in range(count):
            self.stream.copy(self.to, self._parts[i % len(self._parts)])
        return before, self.stream.record(timed=True)

    def finished(self, count: int, events: tuple[Event, Event]) -> float:
        """Bytes/s of these, once the last has arrived."""
        before, after = events
        after.synchronize()
        return count * self.nbytes / after.seconds_since(before)

    def count(self, rate: float, seconds: float) -> int:
        """How many copies take about ``seconds``."""
        return min(QUEUED, max(WARM_UP, ceil(seconds * rate / self.nbytes)))

    def rate(self, seconds: float) -> float:
        """Alone, after a first try that says how many to ask for."""
        self.finished(WARM_UP, self.start(WARM_UP))
        count = self.count(self.finished(WARM_UP, self.start(WARM_UP)), seconds)
        return self.finished(count, self.start(count))


def _beside(copies: _Copies, count: int, work: Work, clock: Clock) -> tuple[float, float]:
    """Link and processor while both work: the processor computes until the last copy arrives."""
    events = copies.start(count)
    began, nbytes = clock(), 0
    while True:
        nbytes += work.compute(FEW, TOGETHER)
        if events[1].done():
            break
    passed = clock() - began
    return copies.finished(count, events), nbytes / passed


def _handover(device: Device, there: torch.Tensor, here: torch.Tensor, clock: Clock) -> float:
    """Seconds in which a token's activations go to the host and back."""
    some = min(ACTIVATIONS, len(here))
    times = []
    for _ in range(ROUNDS):
        began = clock()
        for to, source in ((there, here), (here, there)):
            device.compute.copy(to[:some], source[:some])
            device.compute.record().synchronize()
        times.append(clock() - began)
    return median(times)
