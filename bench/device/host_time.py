"""What the host does for one decode step, from profiles.

Knows: which calls of the CUDA runtime wait, and what "per layer" means. Does not know: engines.

Two profiles of the same prompt, one of a short answer and one of a longer one, are subtracted: what
is left is decoding. Defined as plainly as it can be:

    calls per token     calls of the CUDA runtime or driver, by any thread of the host
    waiting             time in those that only wait for the device, in the thread that decodes
    host us per token   wall time less waiting: Python, launches, bookkeeping
    per layer           by how much the host's time grows with one more layer: the difference
                        between two models driven alike, over the difference of their layers; but 0
                        where the calls do not grow, because then the host does nothing for a layer

The profiler's own cost (about a microsecond per call) is in it. With one model only, all of the
host's time over its layers is an upper bound, and is said to be one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

WAITING = (
    "cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize", "cudaMemcpy",
    "cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize",
)  # fmt: skip
NO_CALL = 0.05  # calls per layer: fewer are not made for each layer of each token


class Call(NamedTuple):
    """Of the CUDA runtime or driver. ``decodes``: by the thread that decodes."""

    name: str
    microseconds: float
    decodes: bool = True


@dataclass(frozen=True, slots=True)
class Profile:
    """``seconds``: wall time of the whole answer."""

    tokens: int
    seconds: float
    calls: Sequence[Call]

    @property
    def waiting(self) -> float:
        """Microseconds."""
        return sum(c.microseconds for c in self.calls if c.decodes and c.name in WAITING)


def host_time(short: Profile, long: Profile) -> dict[str, float]:
    """What each token that ``long`` has beside ``short`` cost the host."""
    tokens = long.tokens - short.tokens
    waiting = (long.waiting - short.waiting) / tokens
    wall = 1e6 * (long.seconds - short.seconds) / tokens
    return {
        "host_calls": round((len(long.calls) - len(short.calls)) / tokens, 2),
        "host_wait_us": round(waiting, 1),
        "host_us": round(max(0.0, wall - waiting), 1),
    }


def per_layer(rows: Sequence[Mapping[str, Any]]) -> tuple[float, str] | None:
    """Host microseconds per layer and token of ``rows`` (with ``layers``, ``host_us`` and
    ``host_calls``) that are driven alike, and of which models."""
    known = sorted((r for r in rows if r.get("host_us") is not None), key=lambda r: r["layers"])
    if not known:
        return None
    fewer, more = known[0], known[-1]
    if fewer["layers"] == more["layers"]:
        return more["host_us"] / more["layers"], f"{more['model']}, an upper bound"
    layers = more["layers"] - fewer["layers"]
    where = f"{fewer['model']} and {more['model']}"
    if (more["host_calls"] - fewer["host_calls"]) / layers < NO_CALL:
        return 0.0, where
    return max(0.0, (more["host_us"] - fewer["host_us"]) / layers), where


def profiled(run: Callable[[], Any], tokens: int) -> Profile:
    """``run`` answers with ``tokens`` tokens. Needs an accelerator."""
    import time

    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
        torch.cuda.synchronize()  # the last call of all, by the thread that decodes
    events = [
        event
        for event in profiler.events()
        if event.name.startswith("cu") and "CPU" in str(event.device_type)
    ]
    own = [event.thread for event in events if event.name == "cudaDeviceSynchronize"][-1:]
    calls = [
        Call(event.name, float(event.time_range.elapsed_us()), [event.thread] == own)
        for event in events
    ]
    return Profile(tokens, seconds, calls)
