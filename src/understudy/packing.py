"""Writes a checkpoint again with its experts in fewer bits, and checks and measures the result.

Knows: the order of the work, the journal that lets it go on after an interrupt, and the moment at
which the new folder gets its name. Does not know: bits (formats), the layout of the new folder
(checkpoint.packed), terminals.

    .OUT.partial/   everything is written here, one expert at a time
        journal     who this is packed from, then one line per finished record
    OUT/            the same folder, renamed when it is complete and measured

A record counts as finished when the journal says so *and* its checksum fits: after a power cut the
journal may be ahead of the data.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

import torch

from understudy import formats
from understudy.anatomy import Anatomy
from understudy.checkpoint import Checkpoint, ExpertsModule, Manifest, files, packed
from understudy.checkpoint.quantized import PACKED
from understudy.core import (
    STORED,
    CheckpointError,
    ExpertId,
    ExpertLayout,
    NotEnoughDisk,
    UnderstudyError,
)
from understudy.engine import Engine
from understudy.evaluate import WINDOW, Distance, distance
from understudy.experts.store import Store
from understudy.experts.transfer import DEMAND_BLOCK, StoreSource
from understudy.formats import CODES, SCALES, CannotPack, WeightFormat
from understudy.plan import automatic_budget, free_memory, shown_size

JOURNAL = "journal"
COPY_BLOCK = 8 << 20
TOKENS = 2048  # of a text that are scored, at most

Report = Callable[[int, int], None]  # (done, in all)
Bar = Callable[[str], Report]


class Outcome(NamedTuple):
    """What `pack` has made. ``quality``: ``None`` where it was not measured."""

    path: Path
    expert_bytes: int
    expert_bytes_before: int
    quality: Distance | None


def default_target(source: str | Path, format: str) -> Path:
    """Beside a folder; in the current one for a hub id."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        folder = folder.resolve()
        return folder.with_name(f"{folder.name}-{format}")
    return Path.cwd() / f"{folder.name}-{format}"


def pack(
    source: str | Path,
    format: str,
    target: Path | None = None,
    *,
    text: str | None = None,
    memory: str | int = "auto",
    bar: Bar = lambda label: lambda done, total: None,
) -> Outcome:
    """Write ``source`` to ``target`` with its experts in ``format``.

    ``text``: what both models are scored on afterwards; ``None``: they are not. ``memory``: for
    each of the two models while they are scored. The target appears complete or not at all; what
    was done before an interrupt is not done again.
    """
    target = target or default_target(source, format)
    work = _Work.plan(source, format, target)
    with work.begun() as journal:
        manifest = work.write(journal, bar)
        quality = None
        if text is not None:
            quality = measure(source, work.partial, text, memory=memory, report=bar("measuring"))
            manifest = replace(manifest, quality=asdict(quality))
            _write_manifest(work.partial, manifest)
    _rename(work.partial, target)
    before = sum(layout.nbytes for layout in work.anatomy.layouts.values())
    return Outcome(target, sum(r.nbytes for _, r in manifest.records()), before, quality)


# ------------------------------------------------------------------------------- what is to be done


@dataclass(frozen=True)
class _Work:
    """One packing, planned before a byte is written."""

    anatomy: Anatomy
    format: WeightFormat
    target: Path
    manifest: Manifest  # without checksums

    @classmethod
    def plan(cls, source: str | Path, format: str, target: Path) -> _Work:
        if format not in formats.lossy_names():
            known = ", ".join(formats.lossy_names())
            raise UnderstudyError(
                f"nothing can be packed as {format!r}; --format is one of {known}"
            )
        if target.exists():
            raise UnderstudyError(f"{target} exists already: delete it, or name another with -o")
        if not target.parent.is_dir():
            raise UnderstudyError(f"{target.parent} is no folder: create it, or name another -o")
        anatomy = Anatomy.of(source)
        if anatomy.checkpoint.format != STORED:
            raise UnderstudyError(
                f"the experts of {anatomy.name} are in {anatomy.checkpoint.format} already: run it"
                " as it is, or pack its bf16 version"
            )
        chosen = formats.get(format)
        layers = tuple(_record(m, anatomy.layouts, chosen) for m in anatomy.modules)
        nothing_yet = tuple((0,) * m.num_experts for m in anatomy.modules)
        return cls(anatomy, chosen, target, Manifest(format, anatomy.name, layers, nothing_yet))

    @property
    def partial(self) -> Path:
        return self.target.with_name(f".{self.target.name}.partial")

    def identity(self) -> dict[str, Any]:
        """What a journal must say to be continued."""
        stats = [(f.name, f.stat()) for f in self.anatomy.checkpoint.files]
        return {
            "version": packed.VERSION,
            "format": self.format.name,
            "source": [[name, s.st_size, s.st_mtime_ns] for name, s in stats],
        }

    def dense(self) -> tuple[files.TensorInfo, ...]:
        return self.anatomy.checkpoint.dense(self.anatomy.bones, self.anatomy.modules)

    def side_files(self) -> list[Path]:
        """Tokenizer, templates, generation settings."""
        folder = self.anatomy.checkpoint.path
        found = {f for pattern in files.SIDE_FILES for f in folder.glob(pattern) if f.is_file()}
        return sorted(f for f in found if f.name not in ("config.json", files.INDEX))

    def nbytes(self) -> int:
        """What the new folder will take."""
        records = sum(record.nbytes for _, record in self.manifest.records())
        texts = sum(f.stat().st_size for f in self.side_files()) + 20 * len(self.anatomy.layouts)
        heads = len(packed.header(self.manifest)) + 200 * len(self.dense())
        return records + texts + heads + sum(t.nbytes for t in self.dense()) + (1 << 16)

    # ------------------------------------------------------------------------------- doing it

    @contextmanager
    def begun(self) -> Iterator[_Journal]:
        """The partial folder, ours alone until the block ends; disk trouble becomes one line."""
        self._check_room()
        try:
            self.partial.mkdir(exist_ok=True)
            with open(self.partial / JOURNAL, "a+", encoding="utf-8") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UnderstudyError(
                        f"{self.partial} is being written by another process: wait for it"
                    ) from None
                yield _Journal.open(file, self.identity(), self.partial)
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NotEnoughDisk(
                    f"the disk of {self.target.parent} is full: make room, and the same command"
                    " goes on where it stopped"
                ) from e
            raise UnderstudyError(f"cannot write {self.partial}: {e.strerror}") from e

    def _check_room(self) -> None:
        there = sum(f.stat().st_blocks * 512 for f in self.partial.glob("*"))
        needed = self.nbytes() - there
        free = shutil.disk_usage(self.target.parent).free
        if needed > free:
            raise NotEnoughDisk(
                f"{self.target} needs {shown_size(needed)} and {shown_size(free)} are free on its"
                " disk: make room, or name another place with -o"
            )

    def write(self, journal: _Journal, bar: Bar) -> Manifest:
        """Every file of the folder; the manifest is the last."""
        checksums = self._write_experts(journal, bar(f"packing {self.format.name}"))
        self._write_dense()
        for file in self.side_files():
            shutil.copyfile(file, self.partial / file.name)
        self._write_config()
        whole = tuple(
            tuple(checksums[ExpertId(layer, e)] for e in range(len(row)))
            for layer, row in enumerate(self.manifest.checksums)
        )
        dense = _crc_of_file(self.partial / files.ONE_FILE)
        manifest = replace(self.manifest, checksums=whole, dense_checksum=dense)
        _write_manifest(self.partial, manifest)
        return manifest

    def _write_experts(self, journal: _Journal, report: Report) -> dict[ExpertId, int]:
        head = packed.header(self.manifest)
        records = list(self.manifest.records())
        checksums: dict[ExpertId, int] = {}
        with _opened(self.partial / files.EXPERTS) as out, _Reader.of(self.anatomy) as reader:
            os.posix_fallocate(out.fileno(), 0, len(head) + sum(r.nbytes for _, r in records))
            out.write(head)
            for number, (expert, record) in enumerate(records):
                at = out.tell()
                known = journal.done.get(expert)
                if known is None or zlib.crc32(out.read(record.nbytes)) != known:
                    data = _packed_record(record, reader.weights(expert), self, expert)
                    out.seek(at)
                    out.write(data)
                    out.flush()  # before the journal says so
                    known = zlib.crc32(data)
                    journal.note(expert, known)
                checksums[expert] = known
                report(number + 1, len(records))
            os.fsync(out.fileno())
        return checksums

    def _write_dense(self) -> None:
        """The dense tensors, byte for byte."""
        tensors = self.dense()
        with open(self.partial / files.ONE_FILE, "wb") as out:
            out.write(_dense_header(tensors))
            for info in tensors:
                with open(self.anatomy.checkpoint.files[info.file], "rb") as source:
                    source.seek(info.offset)
                    _copy(source, out, info.nbytes)
            out.flush()
            os.fsync(out.fileno())

    def _write_config(self) -> None:
        """config.json, with a word that the experts are not where others would look for them."""
        config = files.read_json(self.anatomy.checkpoint.path / "config.json")
        config["quantization_config"] = {"quant_method": PACKED, "format": self.format.name}
        text = json.dumps(config, indent=2) + "\n"
        (self.partial / "config.json").write_text(text, encoding="utf-8")


@dataclass
class _Journal:
    """Which records are finished. One line each: layer, expert, checksum."""

    file: TextIO
    done: dict[ExpertId, int]

    @classmethod
    def open(cls, file: TextIO, identity: dict[str, Any], folder: Path) -> _Journal:
        file.seek(0)
        first, *lines = file.read().split("\n")
        if not first:
            file.write(json.dumps(identity) + "\n")
            file.flush()
            return cls(file, {})
        if first != json.dumps(identity):
            raise UnderstudyError(
                f"{folder} was begun from another source, another version of it or another format:"
                " delete it, or name another place with -o"
            )
        done = {}
        for line in lines[:-1]:  # what follows the last newline was being written when it ended
            layer, expert, checksum = map(int, line.split())
            done[ExpertId(layer, expert)] = checksum
        if lines and lines[-1]:
            file.write("\n")
        return cls(file, done)

    def note(self, expert: ExpertId, checksum: int) -> None:
        self.file.write(f"{expert.layer} {expert.expert} {checksum}\n")
        self.file.flush()


# --------------------------------------------------------------------------------- one expert


def _record(
    module: ExpertsModule, layouts: dict[ExpertId, ExpertLayout], format: WeightFormat
) -> packed.Record:
    """How the experts of a module will lie. Rows are packed one by one, so one row tells."""
    parts: list[tuple[str, str, tuple[int, ...]]] = []
    some = layouts[ExpertId(module.layer, 0)]
    for name, (_, *shape) in module.params.items():
        if len(shape) != 2:
            parts.append((name, some.params[name][0].dtype, tuple(shape)))
            continue
        out, inner = reversed(shape) if module.transposed else shape
        try:
            row = format.pack(torch.zeros(1, inner))
        except CannotPack as e:
            raise CannotPack(f"{module.name}.{name}: {e}") from e
        for ending in (CODES, SCALES):
            tensor = row[ending]
            dtype = str(tensor.dtype).removeprefix("torch.")
            parts.append((name + ending, dtype, (out, *tensor.shape[1:])))
    return packed.Record.of(parts)


def _packed_record(
    record: packed.Record, weights: dict[str, torch.Tensor], work: _Work, expert: ExpertId
) -> bytearray:
    """The bytes of one record."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if tensor.ndim != 2:
            found[name] = tensor
            continue
        try:
            parts = work.format.pack(tensor)
        except CannotPack as e:
            where = f"{work.anatomy.modules[expert.layer].name}.{expert.expert}.{name}"
            raise CannotPack(f"{where}: {e}") from e
        found |= {name + ending: part for ending, part in parts.items()}
    data = bytearray(record.nbytes)
    for part in record.parts:
        tensor = found[part.name].contiguous()
        assert tuple(tensor.shape) == part.shape
        data[part.start : part.start + part.nbytes] = tensor.view(torch.uint8).numpy().tobytes()
    return data


class _Reader:
    """Reads one expert after the other into the same slot."""

    def __init__(self, store: Store, modules: list[ExpertsModule]) -> None:
        self.store, self.modules = store, modules
        self._source = StoreSource(store)

    @classmethod
    @contextmanager
    def of(cls, anatomy: Anatomy) -> Iterator[_Reader]:
        store = Store(anatomy.checkpoint.files, anatomy.layouts, 1)
        try:
            yield cls(store, list(anatomy.modules))
        finally:
            store.close()

    def weights(self, expert: ExpertId) -> dict[str, torch.Tensor]:
        """Parameter -> matrix [out, in] or vector, in one piece."""
        for chunk in self._source.chunks(expert, 0, DEMAND_BLOCK):
            self._source.read(chunk)
        self._source.verify(expert)
        turned = self.modules[expert.layer].transposed
        found = {}
        for name, pieces in self.store.weights(expert, 0).items():
            parts = [p.T if turned and p.ndim == 2 else p for p in pieces]
            found[name] = parts[0] if len(parts) == 1 else torch.cat(parts)
        return found


# -------------------------------------------------------------------------------------- files


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """For reading and writing, created where it is not there; nothing in it is lost."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    with os.fdopen(descriptor, "r+b") as file:
        yield file


def _dense_header(tensors: tuple[files.TensorInfo, ...]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for t in tensors:
        entries[t.name] = {
            "dtype": t.dtype,
            "shape": list(t.shape),
            "data_offsets": [at, at + t.nbytes],
        }
        at += t.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


def _copy(source: BinaryIO, out: BinaryIO, nbytes: int) -> None:
    while nbytes:
        block = source.read(min(nbytes, COPY_BLOCK))
        if not block:
            raise CheckpointError(f"{source.name} was cut while it was read: restore it")
        out.write(block)
        nbytes -= len(block)


def _crc_of_file(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(COPY_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    with open(folder / files.MANIFEST, "w", encoding="utf-8") as file:
        file.write(manifest.as_json())
        file.flush()
        os.fsync(file.fileno())


def _rename(partial: Path, target: Path) -> None:
    """The moment at which the packed checkpoint exists."""
    (partial / JOURNAL).unlink()
    try:
        partial.rename(target)
    except OSError as e:
        raise UnderstudyError(
            f"{partial} is complete but cannot be renamed to {target}: {e.strerror}; rename it"
        ) from e


# ------------------------------------------------------------------------------ afterwards


def verify(folder: str | Path, report: Report = lambda done, total: None) -> int:
    """Read a packed folder and compare all checksums; the number of records that were checked."""
    checkpoint = Checkpoint.open(folder)
    manifest = checkpoint.manifest
    if manifest is None:
        raise CheckpointError(f"{checkpoint.path} was not made by `understudy pack`: it has no"
                              f" {files.MANIFEST} and no checksums")  # fmt: skip
    dense, experts = checkpoint.files
    if _crc_of_file(dense) != manifest.dense_checksum:
        raise CheckpointError(_changed(dense, "it"))
    records = list(manifest.records())
    with open(experts, "rb") as file:
        for number, (expert, record) in enumerate(records):
            file.seek(checkpoint.tensors[packed.record_name(expert)].offset)
            if (
                zlib.crc32(file.read(record.nbytes))
                != manifest.checksums[expert.layer][expert.expert]
            ):
                raise CheckpointError(_changed(experts, packed.record_name(expert)))
            report(number + 1, len(records))
    return len(records)


def _changed(file: Path, what: str) -> str:
    return f"{file}: {what} is not what was packed (checksum): pack again, or copy it again"


def measure(
    source: str | Path,
    packed_folder: Path,
    text: str,
    *,
    memory: str | int = "auto",
    report: Report = lambda done, total: None,
) -> Distance:
    """Run both on ``text`` side by side, each within ``memory``; auto: half of what is free."""
    if memory == "auto":
        memory = automatic_budget(free_memory()) // 2
    with Engine(source, memory=memory) as exact, Engine(packed_folder, memory=memory) as other:
        ids = exact.encode(text[: 16 * TOKENS])[:TOKENS]
        if len(ids) < 2:
            raise UnderstudyError("the text to measure on has less than two tokens: give a longer")
        window = min(exact.plan.context, other.plan.context, WINDOW)
        return distance(exact.model, other.model, ids, window, report)
