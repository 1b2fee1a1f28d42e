"""A real accelerator, in the words of `experts.device`: thin over torch.cuda, nothing to decide.

Knows: torch.cuda. Does not know: experts, slots, models. Everything here is one call deep, because
it is what no machine without an accelerator can test.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from understudy.core import UnderstudyError
from understudy.experts.device import DeviceFull, Event, Graph, PinningRefused, Stream


def open_cuda(asked: str) -> Cuda:
    """``cuda`` is the first that is visible, ``cuda:1`` the second."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise UnderstudyError(
            f"--device {asked}: torch {torch.__version__} sees no accelerator here; "
            "use --device cpu, or install a torch build for your GPU"
        )
    _, colon, number = asked.partition(":")
    if colon and not number.isdigit():
        raise UnderstudyError(f"--device {asked} names no accelerator; use cuda or cuda:0")
    index = int(number or 0)
    if index >= count:
        raise UnderstudyError(f"--device {asked}: only {count} visible; use cuda:0")
    return Cuda(index)


@dataclass(frozen=True, slots=True)
class Seen:
    """One accelerator, as torch sees it. ``memory``: bytes; ``capability``: such as 9.0."""

    index: int
    name: str
    memory: int
    capability: str


def visible() -> list[Seen]:
    """Every accelerator that torch can use here."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = [torch.cuda.get_device_properties(index) for index in range(count)]
    return [
        Seen(index, seen.name, seen.total_memory, f"{seen.major}.{seen.minor}")
        for index, seen in enumerate(found)
    ]


class CudaEvent:
    def __init__(self, stream: torch.cuda.Stream, timed: bool) -> None:
        self.event = torch.cuda.Event(enable_timing=timed)
        self.event.record(stream)

    def done(self) -> bool:
        return bool(self.event.query())

    def synchronize(self) -> None:
        self.event.synchronize()

    def seconds_since(self, earlier: Event) -> float:
        assert isinstance(earlier, CudaEvent)
        return float(earlier.event.elapsed_time(self.event)) / 1e3


class CudaStream:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream = stream
        self._inside: Any = None

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self.stream):
            to.copy_(source, non_blocking=True)

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self.stream.wait_event(event.event)

    def record(self, *, timed: bool = False) -> CudaEvent:
        return CudaEvent(self.stream, timed)

    def __enter__(self) -> CudaStream:
        self._inside = torch.cuda.stream(self.stream)
        self._inside.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._inside.__exit__(*exc)


class CudaGraph:
    """Recorded on a stream of its own (the default stream cannot be), repeated on the one in use.
    Other threads may allocate meanwhile, hence ``thread_local``."""

    def __init__(self, shares: CudaGraph | None) -> None:
        self.graph = torch.cuda.CUDAGraph()
        self._pool: Any = torch.cuda.graph_pool_handle() if shares is None else shares._pool
        # torch gives memory of a pool only to the stream that had it before.
        self._stream: torch.cuda.Stream = torch.cuda.Stream() if shares is None else shares._stream
        self._inside: Any = None

    def begin(self) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # a recording takes new memory, and cannot ask for this meanwhile
        self._inside = torch.cuda.stream(self._stream)
        self._inside.__enter__()
        try:
            self.graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        except BaseException:
            self._inside.__exit__(None, None, None)
            _forget_recording(self._pool)
            raise

    def end(self) -> None:
        try:
            self.graph.capture_end()
        except BaseException:
            _forget_recording(self._pool)
            raise
        finally:
            self._inside.__exit__(None, None, None)
            torch.cuda.synchronize()

    def replay(self) -> None:
        self.graph.replay()


def _forget_recording(pool: tuple[int, int]) -> None:
    """After one that failed. torch 2.11 does not do that: its allocator would believe for good that
    a recording is under way, and whoever draws random numbers (sampling) would fail."""
    index = torch.cuda.current_device()
    with suppress(RuntimeError):  # a torch that has done it says so
        torch._C._cuda_endAllocateToPool(index, pool)
    dice = torch.cuda.default_generators[index]
    dice.graphsafe_set_state(dice.clone_state())


class Cuda:
    """See `experts.device.Device`."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.torch_device = torch.device("cuda", index)
        torch.cuda.set_device(self.torch_device)
        self.name = torch.cuda.get_device_name(index)
        self._pinned: dict[int, torch.Tensor] = {}
        weakref.finalize(self, _unpin_all, self._pinned).atexit = False

    @property
    def compute(self) -> Stream:
        return CudaStream(torch.cuda.current_stream(self.torch_device))

    def stream(self, *, urgent: bool = False) -> Stream:
        return CudaStream(torch.cuda.Stream(self.torch_device, priority=-1 if urgent else 0))

    def free_bytes(self) -> int:
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info(self.torch_device)[0])

    def total_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.torch_device)[1])

    def allocate(self, nbytes: int) -> torch.Tensor:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, device=self.torch_device)
        except torch.OutOfMemoryError:
            free = self.free_bytes()
            raise DeviceFull(
                f"{self.name} has {free >> 20} MiB free, and {nbytes >> 20} MiB were asked for; "
                "use a smaller --device-memory"
            ) from None

    def free(self, memory: torch.Tensor) -> None:
        memory.untyped_storage().resize_(0)

    def pin(self, nbytes: int) -> torch.Tensor:
        """By registering memory of our own: torch's pinned allocator rounds to powers of two."""
        memory = _pages(nbytes)
        code = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, 0))
        if code != 0:
            # CUDA keeps its last error until it is asked for, which torch does after each kernel:
            # without this one the next kernel of somebody else would seem to have failed.
            with suppress(RuntimeError):
                torch.zeros(1, device=self.torch_device)
            raise PinningRefused(
                f"the system refuses to pin {nbytes >> 20} MiB (CUDA error {code})"
            )
        self._pinned[memory.data_ptr()] = memory
        return memory

    def unpin(self, memory: torch.Tensor) -> None:
        pinned = self._pinned.pop(memory.data_ptr(), None)
        if pinned is not None:
            torch.cuda.cudart().cudaHostUnregister(pinned.data_ptr())

    def graph(self, shares: Graph | None = None) -> Graph:
        assert shares is None or isinstance(shares, CudaGraph)
        return CudaGraph(shares)

    def launch(self, kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
        with torch.cuda.device(self.index):  # which each thread has a current one of
            kernel[tuple(grid)](*args, **options)

    def fetch(self, *tensors: torch.Tensor) -> list[Any]:
        """Through pinned memory: a read into pageable memory is staged, and waits twice."""
        found = [self._start(tensor) for tensor in tensors]
        self.compute.record().synchronize()
        return [host.tolist() for host in found]

    def bring(self, tensor: torch.Tensor) -> torch.Tensor:
        host = self._start(tensor)
        self.compute.record().synchronize()
        return host

    @staticmethod
    def _start(tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def send(self, values: torch.Tensor) -> torch.Tensor:
        # torch keeps pinned memory from being given to others until the copy out of it is over.
        return values.pin_memory().to(self.torch_device, non_blocking=True)

    def reads(self, memory: torch.Tensor) -> None:
        """Nothing to look for."""


def _unpin_all(pinned: dict[int, torch.Tensor]) -> None:
    """What nobody has unpinned, before its memory goes: addresses that stay registered are refused
    when the system gives them to us again."""
    while pinned:
        start, memory = pinned.popitem()
        torch.cuda.cudart().cudaHostUnregister(start)
        del memory


def _pages(nbytes: int) -> torch.Tensor:
    """Memory that starts on a page, in huge ones where there are any: pinning takes its time by the
    page. A process that is forked gets none of it; it would be given copies of pinned pages."""
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        if hasattr(mmap, advice):
            with suppress(OSError):
                memory.madvise(getattr(mmap, advice))
    return torch.from_numpy(np.frombuffer(memory, dtype=np.uint8))
