"""What a device is to the rest of the house: memory, streams, events, graphs, and nothing else.

Knows: the words. `cuda` says them to a real accelerator; tests bring a device that is not there,
whose copies happen late and in any order that the fences allow, and which notices a missing fence.
Does not know: experts, slots, models.

Work is asked for in the order of a stream and done later. An event marks a place in a stream;
another stream may wait for it without the host waiting. Only `Event.synchronize` and
`Device.fetch` make the host wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from understudy.core import UnderstudyError


class DeviceFull(UnderstudyError):
    """The device has no memory left for this. Its text names what would fit."""


class PinningRefused(UnderstudyError):
    """The system does not let us pin so much host memory."""


class Event(Protocol):
    """A place in a stream."""

    def done(self) -> bool: ...

    def synchronize(self) -> None:
        """The host waits."""

    def seconds_since(self, earlier: Event) -> float:
        """Device time between two timed events, both done."""


class Stream(Protocol):
    """Work in order. As a context manager: what is launched inside goes to this stream."""

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        """Same shape and dtype; asynchronous where ``source`` or ``to`` is pinned."""

    def wait(self, event: Event) -> None:
        """What this stream is asked for from now on happens after ``event``."""

    def record(self, *, timed: bool = False) -> Event: ...
    def __enter__(self) -> object: ...
    def __exit__(self, *exc: object) -> None: ...


class Graph(Protocol):
    """Device work recorded once and repeated without the host's time. Between `begin` and `end`
    the compute stream records and nothing runs; tensors made there keep their addresses."""

    def begin(self) -> None: ...
    def end(self) -> None: ...
    def replay(self) -> None: ...


class Device(Protocol):
    """One accelerator. ``index`` and ``name`` are for people."""

    index: int
    name: str
    torch_device: torch.device

    @property
    def compute(self) -> Stream:
        """The stream that the model runs on."""

    def stream(self, *, urgent: bool = False) -> Stream: ...
    def free_bytes(self) -> int: ...
    def total_bytes(self) -> int: ...

    def allocate(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] on the device, aligned to 256 bytes. Raises `DeviceFull`."""

    def free(self, memory: torch.Tensor) -> None:
        """Give back what `allocate` gave, whoever still holds a tensor over it: nobody may use it
        any more, and nothing that does may be under way."""

    def pin(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] of page-locked host memory, page-aligned, that the device can read by its
        host address. Raises `PinningRefused`."""

    def unpin(self, memory: torch.Tensor) -> None: ...
    def graph(self, shares: Graph | None = None) -> Graph:
        """``shares``: a graph replayed before this one, whose memory it may use."""

    def launch(self, kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
        """A Triton kernel, on the stream in use."""

    def fetch(self, *tensors: torch.Tensor) -> list[Any]:
        """The tensors as plain lists, in one wait of the host."""

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy in host memory; the host waits for it."""

    def send(self, values: torch.Tensor) -> torch.Tensor:
        """A small tensor of the host, on the device in the order of the compute stream. The host
        does not wait."""

    def reads(self, memory: torch.Tensor) -> None:
        """What the compute stream is asked for next reads ``memory``. For devices that look for
        missing fences; a real one has nothing to do."""
