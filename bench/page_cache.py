"""What the kernel still holds of a file, and making it let go.

Knows: ``mincore``, ``drop_caches``. Does not know: why anybody wants a cold file.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np


def held_share(files: Sequence[Path]) -> float:
    """Share of the bytes of ``files`` that lie in the page cache, 0..1."""
    total = held = 0
    for file in files:
        pages, resident = _mincore(file)
        total, held = total + pages, held + resident
    return held / total if total else 0.0


def _mincore(file: Path) -> tuple[int, int]:
    """(pages of the file, pages of it in memory)."""
    size = file.stat().st_size
    if size == 0:
        return 0, 0
    libc = ctypes.CDLL(None, use_errno=True)
    pages = -(-size // mmap.PAGESIZE)
    answer = np.zeros(pages, dtype=np.uint8)
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), size, prot=mmap.PROT_READ) as mapped:
        view = np.frombuffer(mapped, dtype=np.uint8)
        failed = libc.mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), answer.ctypes
        )
        del view
        if failed:
            raise OSError(ctypes.get_errno(), f"mincore failed on {file}")
    return pages, int((answer & 1).sum())


def forget(files: Sequence[Path]) -> float:
    """Write out and drop what is cached; the share of ``files`` that stayed all the same.

    Dirty pages and pages that a living process has mapped stay, whoever asks.
    """
    os.sync()
    with suppress(OSError):  # no root: each file can still be asked to go
        Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return held_share(files)
