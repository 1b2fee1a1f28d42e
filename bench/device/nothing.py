"""A device that does nothing, at once: what remains is the time of the host that asks it.

Knows: the words of `experts.device`. Does not know: experts. Its memory is the host's, and nothing
is ever copied or computed, so what a model answers on it means nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

GIB = 1 << 30


class Event:
    def done(self) -> bool:
        return True

    def synchronize(self) -> None: ...

    def seconds_since(self, earlier: Event) -> float:
        return 1e-6


class Stream:
    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None: ...
    def wait(self, event: Event) -> None: ...

    def record(self, *, timed: bool = False) -> Event:
        return Event()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exc: object) -> None: ...


class Nothing:
    """See `experts.device.Device`. It records nothing, so load with ``frame="eager"``."""

    index, name, torch_device = 0, "nothing", torch.device("cpu")
    compute = Stream()

    def stream(self, *, urgent: bool = False) -> Stream:
        return Stream()

    def free_bytes(self) -> int:
        return GIB

    def total_bytes(self) -> int:
        return GIB

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def free(self, memory: torch.Tensor) -> None: ...

    def pin(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def unpin(self, memory: torch.Tensor) -> None: ...

    def graph(self, shares: Any = None) -> Any:
        raise NotImplementedError("it records nothing")

    def launch(self, kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None: ...

    def fetch(self, *tensors: torch.Tensor) -> list[Any]:
        return [tensor.tolist() for tensor in tensors]

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.clone()

    def send(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def reads(self, memory: torch.Tensor) -> None: ...
