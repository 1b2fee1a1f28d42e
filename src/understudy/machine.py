"""What the system says of this machine: its processor, the driver of its accelerators.

Knows: the texts of /proc. Does not know: torch, devices, or how fast anything is (`plan` times disk
and memory, `experts.device.ends` the two ends of a miss).
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

Read = Callable[[str], str | None]

# What kernels make use of, by the name that /proc/cpuinfo has for it.
VECTORS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX-512 VNNI",
    "avx512_bf16": "AVX-512 BF16",
    "amx_tile": "AMX",
    "asimd": "NEON",
    "sve": "SVE",
}


@dataclass(frozen=True, slots=True)
class Processor:
    """``cpus``: those that this process may use. ``vectors``: of `VECTORS`, those it has."""

    model: str
    cpus: int
    vectors: tuple[str, ...]


def read_text(path: str) -> str | None:
    with suppress(OSError):
        return Path(path).read_text(encoding="utf-8", errors="replace")
    return None


def processor(read: Read = read_text) -> Processor:
    """The first processor; machines with different ones are rare, and say so themselves."""
    fields: dict[str, str] = {}
    for line in (read("/proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return Processor(
        model=fields.get("model name") or platform.processor() or platform.machine(),
        cpus=cpus(),
        vectors=tuple(word for flag, word in VECTORS.items() if flag in flags),
    )


def cpus() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def load() -> float | None:
    """How many programs wanted a processor, on average over the last minute; None where the system
    does not say."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def driver(read: Read = read_text) -> str | None:
    """The version of NVIDIA's kernel driver; None where it is not loaded."""
    text = read("/proc/driver/nvidia/version") or ""
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", text)
    return found[1] if found else None
