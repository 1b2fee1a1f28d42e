"""A memory limit that nothing in the process can talk its way out of: a cgroup, v1 or v2.

Knows: where this machine keeps memory cgroups, and how one is made, limited, filled and removed.
The page cache a process causes is charged to its group, which is the point: without that, what
looks like a miss is often a hit in the page cache. Does not know: what runs inside.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from understudy.core import UnderstudyError

MOUNT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where groups are made and what their files are called."""

    parent: Path
    limit: str
    peak: str
    swap: str


def hierarchy(own: str | None = None, mount: Path = MOUNT) -> Hierarchy | str:
    """Where groups can be made here, or the reason why not."""
    if os.geteuid() != 0:
        return "a memory limit from outside needs root"
    text = Path("/proc/self/cgroup").read_text(encoding="ascii") if own is None else own
    paths = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    if "memory" in paths and (mount / "memory").is_dir():
        parent = mount / "memory" / paths["memory"].lstrip("/")
        return Hierarchy(
            parent if parent.is_dir() else mount / "memory",
            "memory.limit_in_bytes",
            "memory.max_usage_in_bytes",
            "memory.memsw.limit_in_bytes",
        )
    if "" in paths and (mount / "cgroup.controllers").is_file():
        # v2: a group that holds processes cannot have limited children, its parent can.
        own_group = mount / paths[""].lstrip("/")
        parent = mount if own_group == mount else own_group.parent
        enabled = (parent / "cgroup.subtree_control").read_text(encoding="ascii").split()
        if "memory" in enabled:
            return Hierarchy(parent, "memory.max", "memory.peak", "memory.swap.max")
    return "this machine has no memory cgroup to make a group in"


def why_not() -> str | None:
    """The reason why limits cannot be set here; ``None``: they can."""
    found = hierarchy()
    if isinstance(found, str):
        return found
    if not os.access(found.parent, os.W_OK):
        return f"{found.parent} is not writable"
    return None


class MemoryLimit:
    """One group with a limit of ``nbytes``. A context manager that removes it."""

    def __init__(self, name: str, nbytes: int) -> None:
        found = hierarchy()
        if isinstance(found, str):
            raise UnderstudyError(f"{found}; run the benchmark as root or in RAM cells only")
        self._files = found
        self.folder = found.parent / f"understudy-bench-{os.getpid()}-{name}"
        self.folder.mkdir()
        (self.folder / found.limit).write_text(str(nbytes), encoding="ascii")
        swap = self.folder / found.swap
        if swap.exists():  # no swap either: v1 counts memory and swap together, v2 apart
            swap.write_text(str(nbytes) if "memsw" in found.swap else "0", encoding="ascii")

    def add(self, process: int) -> None:
        """Everything this process allocates or reads from now on counts."""
        (self.folder / "cgroup.procs").write_text(str(process), encoding="ascii")

    @property
    def peak(self) -> int | None:
        """Most bytes ever charged at once, page cache included."""
        with suppress(OSError, ValueError):
            return int((self.folder / self._files.peak).read_text(encoding="ascii"))
        return None

    def close(self) -> None:
        """Remove the group; its processes are to have ended, and may need a moment to be gone."""
        for _ in range(100):
            with suppress(OSError):
                self.folder.rmdir()
                return
            time.sleep(0.05)
        raise UnderstudyError(f"{self.folder} cannot be removed: a process is still in it")
