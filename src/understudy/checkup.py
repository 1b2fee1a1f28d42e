"""What this machine is, how fast it is, and what it lacks: everything that `doctor` reports.

Knows: whom to ask (the system, torch, the compilers, the disk, the processor, one accelerator), in
which order, and what cures what is missing. Does not know: terminals.

Nothing here fails because a part is missing: saying so is the answer.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from understudy import machine, native
from understudy import plan as planning
from understudy.core import UnderstudyError
from understudy.experts import kernels
from understudy.experts.device import Device, cuda, ends
from understudy.experts.device.pinned import Pinnable, probe
from understudy.policies.resolve import Ends, automatic, fetched

Report = Callable[[int, int], None]
Bar = Callable[[str], Report]

DISK_THREADS = (1, 2, 4, 8)
DISK_BLOCKS = (256 << 10, 1 << 20, 4 << 20)
DISK_BYTES = 64 * planning.MIB  # read for each pair of them
SCRATCH_BYTES = 128 * planning.MIB  # written where there is nothing to read
BUSY = 0.5  # of the processors wanted by others
PINNED_BYTES = 8 * planning.GIB  # tried at most: more takes seconds, and says little more
TOP_K = 8  # misses of one event, at most, where no model says how many


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes. ``limit``: of this process's cgroup; ``auto``: what ``--memory auto`` takes;
    ``bandwidth``: bytes/s of one torch reduction."""

    total: int
    free: int
    limit: int | None
    auto: int
    bandwidth: float


@dataclass(frozen=True, slots=True)
class Speed:
    """Bytes/s of reads of one size by so many threads; None: could not be measured."""

    threads: int
    block_bytes: int
    bytes_per_second: float | None


@dataclass(frozen=True, slots=True)
class Disk:
    """``file``: what was read; ``scratch``: it was written for that, and is gone."""

    file: str
    scratch: bool
    direct_io: bool
    speeds: tuple[Speed, ...]

    @property
    def best(self) -> float:
        return max((speed.bytes_per_second or 0.0 for speed in self.speeds), default=0.0)


@dataclass(frozen=True, slots=True)
class Experts:
    """How the processor computes experts of ``expert_bytes``: with which kernel (``why_not_native``
    where it has none), and its line of costs in bytes/s (see `core.Costs`)."""

    expert_bytes: int
    kernel: str
    why_not_native: str | None
    bandwidth: float
    further: float


@dataclass(frozen=True, slots=True)
class Accelerator:
    """One that torch sees. Only one is ``measured``: ``triton`` is None where a kernel could be
    built and run, else why not; ``ends``, and the ``resolver`` for them (its name, and why), are
    None where the measurement was ``refused``; ``pinnable``: host memory that could be pinned, of
    at most `PINNED_BYTES` that were tried."""

    index: int
    name: str
    memory: int
    capability: str
    measured: bool = False
    triton: str | None = None
    ends: Ends | None = None
    resolver: tuple[str, str] | None = None
    refused: str | None = None
    pinnable: Pinnable | None = None


@dataclass(frozen=True, slots=True)
class Missing:
    """Something that would help, and the command that gets it."""

    what: str
    cure: str


@dataclass(frozen=True, slots=True)
class Checkup:
    """The answer. ``load``: programs that wanted a processor in the minute before; ``driver``: of
    NVIDIA; ``torch_cuda``: what torch was built for, if anything."""

    versions: dict[str, str | None]
    processor: machine.Processor
    load: float | None
    memory: Memory
    disk: Disk | None
    experts: Experts
    driver: str | None
    torch_cuda: str | None
    accelerators: tuple[Accelerator, ...]

    @property
    def busy(self) -> bool:
        """Whether others wanted much of the processor: then what was measured is too low."""
        return self.load is not None and self.load > BUSY * self.processor.cpus

    def missing(self) -> list[Missing]:
        """What would help here, most useful first."""
        found = []
        if self.driver is not None and not self.accelerators:
            found.append(Missing("torch that sees the accelerator", _torch_cure(self.torch_cuda)))
        if any(a.triton is not None for a in self.accelerators):
            found.append(Missing("Triton kernels", _triton_cure(self.versions["triton"])))
        if self.experts.why_not_native is not None:
            found.append(Missing("the native kernel", _compiler_cure()))
        if self.disk is not None and not self.disk.direct_io:
            found.append(
                Missing("direct I/O", "keep models on a local disk (not tmpfs, overlay or network)")
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        found = asdict(self)
        for told, seen in zip(found["accelerators"], self.accelerators, strict=True):
            told["phi"] = None if seen.ends is None else seen.ends.phi
        return {**found, "missing": [asdict(one) for one in self.missing()]}


def _torch_cure(built_for: str | None) -> str:
    if built_for is None:
        return "pip install --force-reinstall torch  # this build of torch is without CUDA"
    return f"nvidia-smi  # torch is built for CUDA {built_for}: does the driver see a device?"


def _triton_cure(installed: str | None) -> str:
    if installed is None:
        return "pip install triton"
    return "apt-get install gcc python3-dev  # Triton needs a C compiler and Python's headers"


def _compiler_cure() -> str:
    if shutil.which(os.environ.get("CC", "cc")) is None:
        return "apt-get install gcc"
    return "CC=clang understudy doctor  # another compiler may build it"


# -------------------------------------------------------------------------------------- all of it


def examine(path: Path | None, device: str | None, bar: Bar) -> Checkup:
    """Ask everybody. ``path``: a file or folder on the disk in question, None for the one where
    models lie here. ``device``: the accelerator to measure; None: the first, if there is one;
    "cpu": none. Raises `UnderstudyError` where one of them is not there."""
    load = machine.load()
    accelerator = _open(device)
    disk = _disk(path, bar)
    report = bar("computing experts on the processor")
    memory = _memory()
    report(1, 3)
    crowd = ends.typical()
    report(2, 3)
    experts = _experts(crowd)
    report(3, 3)
    return Checkup(
        versions=_versions(),
        processor=machine.processor(),
        load=load,
        memory=memory,
        disk=disk,
        experts=experts,
        driver=machine.driver(),
        torch_cuda=torch.version.cuda,
        accelerators=tuple(_accelerators(accelerator, crowd, bar)),
    )


def _open(asked: str | None) -> Device | None:
    if asked is None:
        asked = "cuda:0" if cuda.visible() else "cpu"
    return None if asked == "cpu" else cuda.open_cuda(asked)


def _versions() -> dict[str, str | None]:
    packages = ("understudy", "torch", "transformers", "triton")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        **{name: _version(name) for name in packages},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _memory() -> Memory:
    free = planning.free_memory()
    return Memory(
        total=planning.total_memory(),
        free=free,
        limit=planning.memory_limit(),
        auto=planning.automatic_budget(free),
        bandwidth=planning.memory_bandwidth(),
    )


def _experts(crowd: kernels.Crowd) -> Experts:
    rates = ends.host(crowd)
    return Experts(
        expert_bytes=crowd.expert_bytes,
        kernel="native" if crowd.mlp.native_rows else "torch",
        why_not_native=native.why_not(),
        bandwidth=rates.bandwidth,
        further=rates.further,
    )


# --------------------------------------------------------------------------------------- the disk


def _disk(path: Path | None, bar: Bar) -> Disk | None:
    """The speed of the disk under ``path``; None where it cannot even be written to."""
    file = largest_file(path)
    if file is not None:
        return _read(file, bar, scratch=False)
    try:
        with _scratch() as written:
            return _read(written, bar, scratch=True)
    except OSError:
        return None


def largest_file(path: Path | None) -> Path | None:
    """What to read: the file itself, the largest in the folder, else the largest weights here."""
    if path is not None and not path.exists():
        raise UnderstudyError(f"{path} does not exist; name a file or folder to read from")
    if path is not None and path.is_file():
        return path
    files = path.rglob("*") if path is not None else _known_weights()
    sized = [(file.stat().st_size, file) for file in files if file.is_file()]
    if path is not None and not sized:
        raise UnderstudyError(f"{path} holds no file to read; name a model's folder")
    return max(sized)[1] if sized else None


def _known_weights() -> Iterator[Path]:
    """Weights in our own cache and in the models folder."""
    from understudy.demo import models_folder

    folders = [native.cache_folder()]
    with suppress(UnderstudyError):  # installed without them
        folders.append(models_folder())
    for folder in folders:
        yield from folder.glob("*/*.safetensors")


@contextmanager
def _scratch() -> Iterator[Path]:
    """A file that no compression shortens, in our cache folder; removed at the end."""
    folder = native.cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix="doctor-") as file:
        for _ in range(SCRATCH_BYTES // planning.MIB):
            file.write(os.urandom(planning.MIB))
        file.flush()
        os.fsync(file.fileno())
        yield Path(file.name)


def _read(file: Path, bar: Bar, *, scratch: bool) -> Disk:
    direct = planning.direct_io_works(file)
    cells = [(threads, block) for threads in DISK_THREADS for block in DISK_BLOCKS]
    report, speeds = bar("reading the disk"), []
    for done, (threads, block) in enumerate(cells, start=1):
        rate = planning.disk_bandwidth(file, threads, block, DISK_BYTES, direct)
        speeds.append(Speed(threads, block, rate))
        report(done, len(cells))
    return Disk(str(file), scratch, direct, tuple(speeds))


# ------------------------------------------------------------------------------- the accelerators


def _accelerators(measured: Device | None, crowd: kernels.Crowd, bar: Bar) -> Iterator[Accelerator]:
    """All that are visible, ``measured`` with what was measured of it."""
    for seen in cuda.visible():
        facts = asdict(seen)
        if measured is not None and seen.index == measured.index:
            facts |= _measured(measured, crowd, bar(f"copying to {seen.name}"))
        yield Accelerator(**facts)


def _measured(device: Device, crowd: kernels.Crowd, report: Report) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "measured": True,
        "triton": triton_why_not(device),
        "pinnable": probe(device, min(PINNED_BYTES, planning.free_memory() // 2)),
    }
    report(1, 2)
    try:
        both = ends.both(device, crowd)
    except UnderstudyError as error:
        return {**facts, "refused": str(error)}
    report(2, 2)
    return {**facts, "ends": both, "resolver": automatic(both, crowd.expert_bytes, TOP_K)}


def triton_why_not(device: Device) -> str | None:
    """Why Triton cannot be used on ``device``; None where it can: a kernel was built and ran."""
    try:
        from understudy.experts.device import trial
    except ImportError as error:
        return f"not installed ({error})"
    try:
        return None if trial.works(device) else "a kernel of three lines gave a wrong answer"
    except Exception as error:  # compilers, linkers and drivers all fail in their own ways
        first = str(error).strip().splitlines() or [""]
        return f"{type(error).__name__}: {first[0][:160]}"


def split_in_words(both: Ends, misses: int = TOP_K) -> str:
    """What phi means for one event."""
    count = fetched(misses, both.link_beside, both.host_beside)
    here = misses - count
    if not here:
        return f"of {misses} misses all are best fetched"
    if not count:
        return f"of {misses} misses none is best fetched: the processor computes all in place"
    return (
        f"of {misses} misses {count} {'is' if count == 1 else 'are'} best fetched while the "
        f"processor computes {here} in place"
    )
