"""The command ``doctor``: what this machine is, how fast it is, what it lacks.

Knows: how facts are laid out, and what a number means to somebody who has to choose.
Does not know: how anything is found or measured (`checkup`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from understudy.cli import screen, session
from understudy.cli.options import Json, option

if TYPE_CHECKING:
    from understudy.checkup import Accelerator, Checkup, Disk, Memory
    from understudy.experts.device.pinned import Pinnable


def doctor(
    path: Annotated[
        Path | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A model's folder, or any file or folder on the disk in question; default: where "
            "models lie here.",
        ),
    ] = None,
    *,
    device: Annotated[
        str | None,
        option("--device", help="The accelerator to measure: cuda:0, or cpu.", metavar="NAME"),
    ] = None,
    json: Json = False,
) -> None:
    """Say what this machine is, how fast it is, and what it lacks.

    Takes some seconds; what is measured is processor, memory, disk, and one accelerator.
    """
    with screen.waiting("asking torch"):
        session.quiet_guests()
        from understudy.checkup import examine
    with screen.progress() as bar:
        found = examine(path, device, bar)
    screen.show(screen.facts(dict(lines(found))), json_too=json)
    if found.disk is not None:
        screen.show(disk_table(found.disk), json_too=json)
    if found.busy:
        screen.say(f"note: the machine was busy (load {found.load:.1f}): it can do more than this")
    for one in found.missing():
        (screen.say if json else screen.tell)(f"missing: {one.what}; try: {one.cure}")
    if json:
        screen.write_json(found.as_dict())


def lines(found: Checkup) -> Iterator[tuple[str, str]]:
    """Names and values, in the order in which a person asks."""
    for name, version in found.versions.items():
        yield name, version or "not installed"
    processor = found.processor
    yield "processor", f"{processor.model}, {processor.cpus} cpus, {vectors(processor.vectors)}"
    yield "memory", _memory(found.memory)
    yield "memory bandwidth", rate(found.memory.bandwidth)
    yield "native kernel", found.experts.why_not_native or "yes"
    yield "experts", _experts(found)
    yield "disk", _disk(found.disk)
    yield "accelerator", _none(found) if not found.accelerators else _driver(found)
    for accelerator in found.accelerators:
        yield from _accelerator(accelerator)


def vectors(names: tuple[str, ...]) -> str:
    return ", ".join(names) or "no vector instructions that we use"


def rate(value: float) -> str:
    return f"{value / 1e9:.3g} GB/s" if value else "-"


def _memory(memory: Memory) -> str:
    from understudy.plan import shown_size

    limit = "" if memory.limit is None else f", this process may have {shown_size(memory.limit)}"
    return (
        f"{shown_size(memory.total)}, {shown_size(memory.free)} free{limit}; "
        f"--memory auto takes {shown_size(memory.auto)}"
    )


def _experts(found: Checkup) -> str:
    """One token each; what a further token costs decides how many tokens are worth a fetch."""
    experts = found.experts
    share = 100 * experts.bandwidth / experts.further
    return (
        f"the processor computes them at {rate(experts.bandwidth)} of weights, kernel "
        f"{experts.kernel} (bf16, {experts.expert_bytes / 1e6:.1f} MB); a further token costs "
        f"{share:.0f} % of the first"
    )


def _disk(disk: Disk | None) -> str:
    if disk is None:
        return "not measured: the cache folder cannot be written; name a file or folder to read"
    direct = "direct I/O works" if disk.direct_io else "no direct I/O: through the page cache"
    read = "a file written for this" if disk.scratch else disk.file
    return f"{rate(disk.best)} at best, {direct} ({read})"


def _none(found: Checkup) -> str:
    """One line that says so, and why if that can be told."""
    built = f"torch is built for CUDA {found.torch_cuda}" if found.torch_cuda else (
        "torch is a build without CUDA"
    )  # fmt: skip
    driver = f"NVIDIA driver {found.driver}" if found.driver else "no NVIDIA driver"
    return f"none ({built}, {driver}): experts go from disk to memory and are computed here"


def _driver(found: Checkup) -> str:
    return f"NVIDIA driver {found.driver or 'of unknown version'}, CUDA {found.torch_cuda}"


def _accelerator(seen: Accelerator) -> Iterator[tuple[str, str]]:
    from understudy.plan import shown_size

    name = f"cuda:{seen.index}"
    yield name, f"{seen.name}, {shown_size(seen.memory)}, compute capability {seen.capability}"
    if not seen.measured:
        return
    yield f"{name} Triton", seen.triton or "works: a kernel was built and ran"
    if seen.pinnable is not None:
        yield f"{name} pinned", _pinnable(seen.pinnable)
    if seen.ends is None:
        yield f"{name} link", f"not measured: {seen.refused}"
        return
    both = seen.ends
    yield (
        f"{name} link",
        (
            f"{rate(both.link)} from pinned memory, {rate(both.link_beside)} beside the processor; "
            f"{rate(both.pageable)} from pageable memory"
        ),
    )
    beside = f"{rate(both.host_beside)} beside the link"
    yield f"{name} processor", f"{rate(both.host)} of experts' weights, {beside}"
    yield f"{name} phi", _phi(seen)


def _pinnable(found: Pinnable) -> str:
    """How much, and where more was tried, what the system said."""
    from understudy.experts.device.pinned import memlock_advice
    from understudy.plan import shown_size

    size = shown_size(found.nbytes)
    if found.refusal is None:
        return f"{size} of host memory in {found.seconds:.1f} s; no more was tried"
    return f"{size} of host memory, then refused: {found.refusal}. {memlock_advice()}"


def _phi(seen: Accelerator) -> str:
    """The number, what it means, and what to type."""
    from understudy.checkup import split_in_words

    assert seen.ends is not None and seen.resolver is not None
    name, why = seen.resolver
    return f"{seen.ends.phi:.2f}: {split_in_words(seen.ends)}; --resolver {name}: {why}"


def disk_table(disk: Disk) -> Table:
    """Bytes per second by threads and size of the reads."""
    from understudy.plan import shown_size

    speed = {(s.threads, s.block_bytes): s.bytes_per_second for s in disk.speeds}
    threads, blocks = (sorted({key[i] for key in speed}) for i in (0, 1))
    table = screen.grid("disk", *(f"{shown_size(block)} reads" for block in blocks))
    for count in threads:
        label = f"{count} thread{'s' if count > 1 else ''}"
        table.add_row(label, *(rate(speed[count, block] or 0.0) for block in blocks))
    return table
