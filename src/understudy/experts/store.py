"""Where expert bytes lie and how they become tensors: the files, the arena, the windows.

Knows: byte ranges, file descriptors, page-aligned memory, strided views. Does not know: which
expert is needed or when (policies), in what order reads are issued (transfer).

A slot holds whole pages as they lie in the file, so that O_DIRECT can write into it and so that an
expert keeps its file offset modulo 4096 in every mode: some one-row products were seen to depend on
the address modulo 16.

    file  |....[==== down gate up ====]........|      read:   offset, nbytes
    pages |..|----window, whole pages----|.....|      window: what is asked of the disk
    slot  |  |pad[ down gate up ]pad     |            the same bytes, at the same offset in a page
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from understudy.core import ExpertId, ExpertLayout, ReadFailed

PAGE = 4096


class Window(NamedTuple):
    """Whole pages of one file, and where in a slot they go. ``end``: the last byte that matters,
    counted from the start of the window (a file may end inside its last page)."""

    file: int
    offset: int
    nbytes: int
    at: int
    end: int


class Chunk(NamedTuple):
    """A part of a window: one read. ``view`` is the memory it fills."""

    file: int
    offset: int
    view: memoryview
    least: int


def windows(layout: ExpertLayout) -> tuple[Window, ...]:
    """The page-aligned windows of an expert, laid one after the other in its slot."""
    result, at = [], 0
    for read in layout.reads:
        first = read.offset // PAGE * PAGE
        end = read.offset + read.nbytes
        nbytes = -(-end // PAGE) * PAGE - first
        result.append(Window(read.file, first, nbytes, at, end - first))
        at += nbytes
    return tuple(result)


def slot_bytes(layouts: Mapping[ExpertId, ExpertLayout]) -> int:
    """Bytes of a slot that can hold any of these experts."""
    return max(sum(w.nbytes for w in windows(layout)) for layout in layouts.values())


class Arena:
    """``slots`` equal, page-aligned places in one anonymous mapping. Pages are taken from the
    system when they are first written, and given back by `close`."""

    def __init__(self, slots: int, nbytes: int) -> None:
        if nbytes % PAGE:
            raise ValueError("a slot is a whole number of pages")
        self.slots, self.nbytes = slots, nbytes
        # Private: Python's own default is shared memory, which takes no huge pages here, and whose
        # first pass reads at half the speed.
        self._map = mmap.mmap(-1, slots * nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(self._map)
        # Through numpy: it exports the buffer, so that the mapping cannot be closed under a tensor
        # (torch.frombuffer does not, and such a tensor would crash the process).
        self.tensor = torch.from_numpy(np.frombuffer(self._map, dtype=np.uint8))
        self._typed: dict[tuple[str, int], torch.Tensor] = {}

    def typed(self, name: str, start: int) -> torch.Tensor:
        """All of it as elements of that dtype, so that one of them begins at byte ``start``."""
        dtype = getattr(torch, name)
        key = name, start % dtype.itemsize
        if key not in self._typed:
            whole = self.tensor[key[1] :]
            whole = whole[: whole.numel() // dtype.itemsize * dtype.itemsize]
            self._typed[key] = whole.view(dtype)
        return self._typed[key]

    def view(self, slot: int) -> memoryview:
        return self._view[slot * self.nbytes : (slot + 1) * self.nbytes]

    def close(self) -> None:
        """Give the memory back, as far as nobody still holds a tensor over it."""
        self._typed.clear()
        self.tensor = torch.empty(0, dtype=torch.uint8)
        self._view.release()
        try:
            self._map.close()
        except BufferError:  # an interrupted forward still holds views; the mapping dies with them
            self._map.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True, slots=True)
class _Identity:
    """What must not change about a file while it is being read."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, path: Path) -> _Identity:
        s = os.stat(path)
        return cls(s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev)


class Disk:
    """The checkpoint's files, opened once. ``direct``: try O_DIRECT; where the file system refuses
    it, reads go through the page cache and `direct` says so."""

    def __init__(self, files: Sequence[Path], *, direct: bool = True) -> None:
        self.files = list(files)
        self._identity = [_Identity.of(f) for f in self.files]
        self.direct = direct and hasattr(os, "O_DIRECT")
        self._fds: list[int] = []
        try:
            for f in self.files:
                self._fds.append(self._open(f))
        except OSError as e:
            self.close()
            raise ReadFailed(f"{e.filename}: cannot be opened: {e.strerror}") from e

    def _open(self, path: Path) -> int:
        if self.direct:
            try:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
                os.preadv(fd, [memoryview(mmap.mmap(-1, PAGE))], 0)
                return fd
            except OSError as e:
                if e.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP):
                    raise
                self.direct = False
        return os.open(path, os.O_RDONLY)

    def read(self, chunk: Chunk) -> None:
        """Fill ``chunk.view`` from the file, at least its first ``least`` bytes (a file may end
        inside its last page). Raises `ReadFailed`; never leaves a wrong answer unnoticed."""
        done = 0
        while done < chunk.least:
            try:
                n = os.preadv(self._fds[chunk.file], [chunk.view[done:]], chunk.offset + done)
            except OSError as e:
                raise ReadFailed(
                    f"{self.files[chunk.file]}: cannot read at byte {chunk.offset + done}: "
                    f"{e.strerror}; check the disk, then run again"
                ) from e
            done += n
            # O_DIRECT comes back inside a page only at the end of the file.
            if n == 0 or (done < chunk.least and self.direct and done % PAGE):
                raise ReadFailed(
                    f"{self.files[chunk.file]}: ends at byte {chunk.offset + done}, more was "
                    "expected; the file was cut while running: restore it and load it again"
                )

    def check(self, file: int) -> None:
        """Raise `ReadFailed` if the file is not the one that was opened, byte for byte as far as
        the file system can tell. Called after the last read of an expert."""
        path = self.files[file]
        try:
            now = _Identity.of(path)
        except OSError as e:
            raise ReadFailed(
                f"{path}: went away while running ({e.strerror}); restore it and run again"
            ) from e
        if now != self._identity[file]:
            raise ReadFailed(f"{path}: was changed while running; load the model again")

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds = []


class Weights(dict[str, tuple[torch.Tensor, ...]]):
    """Parameter name -> its pieces. ``addresses``: where the native kernel finds them; it keeps
    them here, because they hold for as long as the expert holds its slot."""

    addresses: bytes | None = None


class Store:
    """Disk tier and host arena together: expert + slot -> chunks to read, and weights to use."""

    def __init__(
        self, files: Sequence[Path], layouts: Mapping[ExpertId, ExpertLayout], slots: int,
        *, direct: bool = True,
    ) -> None:  # fmt: skip
        self.layouts = layouts
        self._windows = {expert: windows(layout) for expert, layout in layouts.items()}
        self.disk = Disk(files, direct=direct)
        self.arena = Arena(slots, slot_bytes(layouts))
        self._weights: dict[int, tuple[ExpertId, Weights]] = {}

    def nbytes(self, expert: ExpertId) -> int:
        """What a load of ``expert`` asks of the disk."""
        return sum(w.nbytes for w in self._windows[expert])

    def files_of(self, expert: ExpertId) -> set[int]:
        return {w.file for w in self._windows[expert]}

    def chunks(self, expert: ExpertId, slot: int, block: int) -> list[Chunk]:
        """The reads that bring ``expert`` into ``slot``, each of at most ``block`` bytes."""
        view = self.arena.view(slot)
        result = []
        for w in self._windows[expert]:
            for start in range(0, w.nbytes, block):
                stop = min(start + block, w.nbytes)
                least = min(stop, w.end) - start
                if least > 0:
                    part = view[w.at + start : w.at + stop]
                    result.append(Chunk(w.file, w.offset + start, part, least))
        return result

    def weights(self, expert: ExpertId, slot: int) -> Weights:
        """Parameter name -> its pieces, as views of the slot in the stored dtype."""
        known = self._weights.get(slot)
        if known is None or known[0] != expert:
            known = (expert, self._views(expert, slot))
            self._weights[slot] = known
        return known[1]

    def _views(self, expert: ExpertId, slot: int) -> Weights:
        layout, placed = self.layouts[expert], self._windows[expert]
        base = slot * self.arena.nbytes
        views = Weights()
        for name, pieces in layout.params.items():
            parts = []
            for p in pieces:
                w, read = placed[p.read], layout.reads[p.read]
                start = base + w.at + (read.offset - w.offset) + p.start
                typed = self.arena.typed(p.dtype, start)
                parts.append(typed.as_strided(p.shape, p.strides, start // typed.itemsize))
            views[name] = tuple(parts)
        return views

    def close(self) -> None:
        self._weights.clear()
        self.disk.close()
        self.arena.close()
