"""How fast the parts are by themselves: memory, link, kernels.

Knows: a device, buffers larger than any cache, what a call must read at least. Does not know:
engines, models, cells. Each figure is the best of a few: it stands for what the machine can do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from bench.device import adapter
from understudy import formats
from understudy import plan as planning
from understudy.core import STORED, ByteRange, ExpertLayout, Piece, UnderstudyError
from understudy.experts.device import Device
from understudy.experts.device.slab import Slab

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of what is timed. The experts are Qwen3-30B-A3B's, ``k`` of them for a token; ``arena``:
    bytes of slots, several times what a device's last cache holds."""

    hidden: int = 2048
    width: int = 768
    k: int = 8
    arena: int = 768 * MIB
    device: int = 4096 * MIB
    link: int = 512 * MIB
    cpu: int = 512 * MIB
    repeats: int = 5


Figure = dict[str, Any]  # name, of, rate (bytes/s), share; what else is known
NAMES = ("link", "device", "cpu", "expert bf16", "gather")
FORMATS = ("expert int8", "expert int4")  # without a target: measured when all else was


def one(name: str, device: Device | None, sizes: Sizes, rates: Mapping[str, float]) -> Figure:
    """The figure called ``name``. ``rates``: what was measured before, ``link`` and ``device``
    among it, of which the kernels reach a share."""
    what, _, format = name.partition(" ")
    if what == "cpu":
        rate = planning.memory_bandwidth(sizes.cpu, repeats=3)
        return {"name": name, "of": "reading CPU memory", "rate": rate}
    if device is None:
        raise UnderstudyError("needs an accelerator")
    if what == "link":
        return {"name": name, "of": "copy engine, pinned memory", "rate": link(device, sizes)}
    if what == "device":
        return {"name": name, "of": "reading device memory", "rate": device_memory(device, sizes)}
    if what == "gather":
        rate, how = gather(device, sizes)
        return {"name": name, "of": "of link", "rate": rate, "how": how,
                "share": _share(rate, rates.get("link"))}  # fmt: skip
    rate = experts(device, STORED if format == "bf16" else format, sizes)
    of = f"of device, 1 token, {sizes.k} experts"
    return {"name": name, "of": of, "rate": rate, "share": _share(rate, rates.get("device"))}


def _share(rate: float, of: float | None) -> float | None:
    return None if not of else round(rate / of, 4)


# ---------------------------------------------------------------------------------------- memories


def link(device: Device, sizes: Sizes) -> float:
    """Pinned memory to the device by the copy engine: in one piece, and expert by expert; whichever
    is faster, because a floor must be lower than anything possible."""
    source, there = device.pin(sizes.link), device.allocate(sizes.link)
    source.fill_(1)  # untouched memory may be a single page of zeros
    expert = 6 * sizes.hidden * sizes.width
    stream = device.stream()

    def pieces(nbytes: int) -> Callable[[], int]:
        def run() -> int:
            with stream:
                for start in range(0, sizes.link - nbytes + 1, nbytes):
                    stream.copy(there[start : start + nbytes], source[start : start + nbytes])
            return sizes.link // nbytes * nbytes

        return run

    try:
        return max(best(stream, pieces(n), sizes.repeats) for n in (sizes.link, expert))
    finally:
        device.unpin(source)


def device_memory(device: Device, sizes: Sizes) -> float:
    """One reduction over memory that no cache holds, and one copy, which reads and writes."""
    numbers = device.allocate(sizes.device).view(torch.float32)
    half = len(numbers) // 2
    with device.compute:
        numbers.zero_()

    def read() -> int:
        with device.compute:
            torch.sum(numbers)
        return numbers.nbytes

    def copy() -> int:
        with device.compute:
            numbers[:half].copy_(numbers[half : 2 * half])
        return 2 * half * 4

    return max(best(device.compute, run, sizes.repeats) for run in (read, copy))


def best(stream: Any, run: Callable[[], int], repeats: int) -> float:
    """Bytes per second of the fastest run, by the device's clock; the first is not counted."""
    found: list[float] = []
    for _ in range(repeats + 1):
        begun = stream.record(timed=True)
        nbytes = run()
        ended = stream.record(timed=True)
        ended.synchronize()
        found.append(nbytes / max(ended.seconds_since(begun), 1e-12))
    return max(found[1:])


# ----------------------------------------------------------------------------------------- kernels


def layout(matrices: Mapping[str, torch.Tensor], format: str) -> ExpertLayout:
    """Of an expert whose parts lie one after the other, as `Slab.of` wants it."""
    params, start = {}, 0
    for name, part in matrices.items():
        dtype = str(part.dtype).removeprefix("torch.")
        params[name] = (Piece(0, start, dtype, tuple(part.shape), tuple(part.stride())),)
        start += part.nbytes
    return ExpertLayout((ByteRange(0, 0, start),), params, format)


def packed(format: str, hidden: int, width: int) -> dict[str, torch.Tensor]:
    """One random expert in ``format``, by the names of its parts."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, torch.Tensor] = {}
    for name, shape in (("gate_up_proj", (2 * width, hidden)), ("down_proj", (hidden, width))):
        matrix = (torch.randn(shape, generator=generator) * shape[1] ** -0.5).bfloat16()
        parts = {"": matrix} if format == STORED else formats.get(format).pack(matrix)
        found |= {f"{name}{part}": tensor for part, tensor in parts.items()}
    return found


def _filled(device: Device, slab: Slab, parts: Mapping[str, torch.Tensor], slots: int) -> Any:
    """Slots on the device, the expert of ``parts`` in each."""
    host, arena = device.pin(slab.nbytes), device.allocate(slots * slab.nbytes)
    slab.pack({name: (part,) for name, part in parts.items()}, host)
    for slot in range(slots):
        device.compute.copy(arena[slot * slab.nbytes : (slot + 1) * slab.nbytes], host)
    device.compute.record().synchronize()
    device.unpin(host)
    return arena


def experts(device: Device, format: str, sizes: Sizes) -> float:
    """Bytes of weights per second that the expert kernel reads for one token. Recorded calls, each
    of other slots than the one before, so that neither launches nor caches are measured."""
    parts = packed(format, sizes.hidden, sizes.width)
    slab = Slab.of(layout(parts, format), transposed=False)
    calls = max(2, sizes.arena // slab.nbytes // sizes.k)
    arena = _filled(device, slab, parts, calls * sizes.k)
    few = adapter.expert_kernel(device, slab, format, torch.bfloat16, arena, sizes.k)
    where = device.torch_device
    with device.compute:
        x = torch.ones(1, sizes.hidden, dtype=torch.bfloat16, device=where)
        weights = torch.full((1, sizes.k), 1 / sizes.k, dtype=torch.bfloat16, device=where)
        slots = torch.arange(calls * sizes.k, dtype=torch.int32, device=where)
        named = list(slots.view(calls, 1, sizes.k))
        few(x, named[0], weights)  # compiles
    device.compute.record().synchronize()
    graph = device.graph()
    graph.begin()
    for one in named:
        few(x, one, weights)
    graph.end()
    nbytes = sum(field.nbytes for field in slab.fields.values())

    def run() -> int:
        graph.replay()
        return calls * sizes.k * nbytes

    return best(device.compute, run, sizes.repeats)


def gather(device: Device, sizes: Sizes) -> tuple[float, str]:
    """Bytes per second of the kernel by which the device fetches, with as much of the device as the
    engine would give it; and how much that is. Different experts, none of them in a cache."""
    nbytes = 6 * sizes.hidden * sizes.width
    count = min(adapter.MOST_MOVES, max(1, sizes.link // nbytes))
    host, arena = device.pin(count * nbytes), device.allocate(count * nbytes)
    host.fill_(1)
    try:
        addresses = [host.data_ptr() + i * nbytes for i in range(count)]
        return adapter.gather_rate(device, arena, nbytes, addresses)
    finally:
        device.unpin(host)
