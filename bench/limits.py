"""Memory limits that are real: cgroups, dropped caches, and a look whether a file is out of them.

Knows: the kernel's files (cgroup v1 and v2, drop_caches, mincore). Does not know: contestants.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20
OVERHEAD = 700 * MIB  # interpreter, torch, transformers: the same for every contestant
ROOT = Path("/sys/fs/cgroup")


class NoLimits(Exception):
    """This machine or this user cannot limit memory; the text says why."""


@dataclass(frozen=True, slots=True)
class Group:
    """One memory cgroup. ``enter`` is the shell command that moves a process into it."""

    folder: Path
    peak_file: Path

    @property
    def enter(self) -> str:
        return f"echo $$ > {self.folder / 'cgroup.procs'}"

    def peak(self) -> int:
        """The most bytes it ever held, page cache included."""
        return int(self.peak_file.read_text())


@contextmanager
def limited(name: str, nbytes: int) -> Iterator[Group]:
    """A cgroup that may hold ``nbytes``; removed when its processes are gone."""
    v1 = (ROOT / "memory" / "memory.limit_in_bytes").exists()
    folder = (ROOT / "memory" if v1 else ROOT) / f"understudy-bench-{os.getpid()}-{name}"
    try:
        folder.mkdir()
        (folder / ("memory.limit_in_bytes" if v1 else "memory.max")).write_text(str(nbytes))
    except OSError as e:
        if folder.exists():
            folder.rmdir()
        raise NoLimits(f"cannot make a memory cgroup: {e.strerror} (needs root)") from e
    try:
        peak = "memory.max_usage_in_bytes" if v1 else "memory.peak"
        yield Group(folder, folder / peak)
    finally:
        _remove(folder)


def _remove(folder: Path) -> None:
    for _ in range(100):  # a process that was killed takes a moment to leave
        try:
            folder.rmdir()
            return
        except OSError:
            time.sleep(0.05)


def drop_caches() -> None:
    """Forget every clean page of every file. Needs root; `NoLimits` without."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError as e:
        raise NoLimits(f"cannot drop the page cache: {e.strerror} (needs root)") from e


def cached_share(files: Sequence[Path]) -> float:
    """Which part of these files lies in the page cache, 0..1."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = resident = 0
    for file in files:
        size = file.stat().st_size
        if not size:
            continue
        count = -(-size // mmap.PAGESIZE)
        with (
            file.open("rb") as f,
            mmap.mmap(
                f.fileno(), size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE
            ) as view,
        ):
            anchor = ctypes.c_char.from_buffer(view)
            seen = (ctypes.c_ubyte * count)()
            if libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), seen):
                raise OSError(ctypes.get_errno(), "mincore failed")
            del anchor
            pages, resident = pages + count, resident + sum(b & 1 for b in seen)
    return resident / max(1, pages)
