"""A packed checkpoint: the folder that `understudy pack` writes, as its manifest describes it.

Knows: the manifest (understudy.json), how an expert's record is laid out, where records lie.
Does not know: how codes and scales are made or used, or how a folder gets written.

    config.json, tokenizer ...   copied from the source
    model.safetensors            the dense tensors as the source stores them
    experts.safetensors          one record per expert, in the order of the forward pass, each of
                                 whole pages and beginning on one: a direct read fetches no more
    understudy.json              the manifest

A record holds what one expert needs, one part after the other: codes, scales, biases.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from understudy.checkpoint import files
from understudy.checkpoint.files import EXPERTS, MANIFEST, TensorInfo
from understudy.checkpoint.layouts import ExpertsModule
from understudy.core import ByteRange, CheckpointError, ExpertId, ExpertLayout, Piece

VERSION = 1
PAGE = 4096
ALIGNMENT = 64  # of a part inside its record, bytes: a cache line, and any vector register

ITEMSIZE = MappingProxyType(
    {"uint8": 1, "int8": 1, "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
)


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor inside a record. ``name``: as compute asks for it ("down_proj_scales")."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * ITEMSIZE[self.dtype]

    def piece(self) -> Piece:
        strides = tuple(prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        return Piece(0, self.start, self.dtype, self.shape, strides)


@dataclass(frozen=True, slots=True)
class Record:
    """How every expert of one MoE layer is laid out. ``nbytes``: whole pages."""

    nbytes: int
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, parts: Sequence[tuple[str, str, tuple[int, ...]]]) -> Record:
        """Lay out (name, dtype, shape), one after the other."""
        placed, at = [], 0
        for name, dtype, shape in parts:
            at = -(-at // ALIGNMENT) * ALIGNMENT
            placed.append(Part(name, dtype, shape, at))
            at += placed[-1].nbytes
        return cls(-(-at // PAGE) * PAGE, tuple(placed))

    @property
    def used(self) -> int:
        """Bytes without the padding at the end."""
        return max(part.start + part.nbytes for part in self.parts)


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a packed folder says about itself.

    ``layers``: the record of each MoE layer. ``checksums``: CRC-32 of each record, padding
    included, by layer and expert; ``dense_checksum``: of all of model.safetensors. ``quality``:
    how far from its source it was measured to be.
    """

    format: str
    source: str
    layers: tuple[Record, ...]
    checksums: tuple[tuple[int, ...], ...]
    dense_checksum: int = 0
    quality: Mapping[str, Any] | None = None

    def records(self) -> Iterator[tuple[ExpertId, Record]]:
        """In the order in which they lie in the file."""
        for layer, record in enumerate(self.layers):
            for expert in range(len(self.checksums[layer])):
                yield ExpertId(layer, expert), record

    def as_json(self) -> str:
        kinds = list(dict.fromkeys(self.layers))  # most models have one record for all layers
        return json.dumps(
            {
                "version": VERSION,
                "format": self.format,
                "source": self.source,
                "records": [asdict(kind) for kind in kinds],
                "record_of_layer": [kinds.index(record) for record in self.layers],
                "quality": self.quality,
                "checksum": "crc32",
                "dense_checksum": self.dense_checksum,
                "checksums": self.checksums,
            },
            indent=1,
        )


# ------------------------------------------------------------------------------------ reading it


def read_manifest(path: Path) -> Manifest:
    """The manifest of the folder, every number in it checked."""
    file = path / MANIFEST
    raw = files.read_json(file)
    version = raw.get("version") if isinstance(raw, dict) else None
    if version != VERSION:
        raise CheckpointError(
            f"{file} is of version {version!r} and this understudy reads version {VERSION}: "
            "pack the model again, or use the understudy that packed it"
        )
    try:
        return _parse(raw)
    except (KeyError, TypeError, ValueError, IndexError) as e:
        raise CheckpointError(f"{file} is damaged ({type(e).__name__}: {e}): pack again") from e


def _parse(raw: Mapping[str, Any]) -> Manifest:
    kinds = [_record(kind) for kind in raw["records"]]
    layers = tuple(kinds[number] for number in raw["record_of_layer"])
    checksums = tuple(tuple(int(c) for c in layer) for layer in raw["checksums"])
    if len(layers) != len(checksums) or not all(checksums):
        raise ValueError(f"{len(layers)} layers, checksums for {len(checksums)}")
    return Manifest(
        str(raw["format"]),
        str(raw["source"]),
        layers,
        checksums,
        int(raw["dense_checksum"]),
        raw["quality"],
    )


def _record(raw: Mapping[str, Any]) -> Record:
    parts = tuple(
        Part(str(p["name"]), str(p["dtype"]), tuple(int(n) for n in p["shape"]), int(p["start"]))
        for p in raw["parts"]
    )
    record = Record(int(raw["nbytes"]), parts)
    if record.nbytes % PAGE or record.used > record.nbytes:
        raise ValueError(f"a record of {record.nbytes} bytes for {record.used}")
    for part in parts:
        if part.start < 0 or part.start % ALIGNMENT or min(part.shape) < 1:
            raise ValueError(f"{part.name} at {part.start} of shape {part.shape}")
    return record


def record_name(expert: ExpertId) -> str:
    """What an expert's record is called in the experts file."""
    return f"experts.{expert.layer}.{expert.expert}"


def read_tensors(path: Path, manifest: Manifest) -> tuple[tuple[Path, ...], dict[str, TensorInfo]]:
    """The two files, and every tensor in them. Dense ones are in file 0, records in file 1."""
    both = path / files.ONE_FILE, path / EXPERTS
    for file in both:
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: pack again, or copy the whole folder")
    expected = len(header(manifest)) + sum(record.nbytes for _, record in manifest.records())
    found = both[1].stat().st_size
    if found != expected:
        raise CheckpointError(
            f"{both[1]} has {found} bytes and {MANIFEST} says {expected}: it was cut or replaced;"
            " pack again, or copy the whole folder"
        )
    tensors = {t.name: t for n, file in enumerate(both) for t in files.read_header(file, n)}
    for expert, record in manifest.records():
        info = tensors.get(record_name(expert))
        if info is None or info.file != 1 or info.nbytes != record.nbytes or info.offset % PAGE:
            raise CheckpointError(
                f"{both[1]} and {MANIFEST} do not belong together ({record_name(expert)}): pack"
                " again, or copy the whole folder"
            )
    return both, tensors


def layouts(
    manifest: Manifest, tensors: Mapping[str, TensorInfo], modules: Sequence[ExpertsModule]
) -> dict[ExpertId, ExpertLayout]:
    """Where each expert lies: one read of one record."""
    if [m.num_experts for m in modules] != [len(layer) for layer in manifest.checksums]:
        raise CheckpointError(_strangers("another number of layers or experts"))
    for module, record in zip(modules, manifest.layers, strict=True):
        _check(module, record)
    found = {}
    for expert, record in manifest.records():
        at = tensors[record_name(expert)]
        reads = (ByteRange(at.file, at.offset, record.used),)
        params = {part.name: (part.piece(),) for part in record.parts}
        found[expert] = ExpertLayout(reads, params, manifest.format)
    return found


def _check(module: ExpertsModule, record: Record) -> None:
    """Every parameter is there, with as many output rows as the model's."""
    parts = {part.name: part.shape for part in record.parts}
    for name, shape in module.params.items():
        rows = shape[-1] if module.transposed or len(shape) == 2 else shape[1]
        if name not in parts or parts[name][0] != rows:
            raise CheckpointError(_strangers(f"{name} of {module.name} is {list(shape[1:])} there"))


def _strangers(why: str) -> str:
    return f"{MANIFEST} and config.json do not belong together ({why}): pack again"


# ------------------------------------------------------------------------------------ writing it


def header(manifest: Manifest) -> bytes:
    """The head of the experts file, padded so that the first record begins on a page."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "packed": manifest.format}}
    at = 0
    for expert, record in manifest.records():
        entries[record_name(expert)] = {
            "dtype": "U8",
            "shape": [record.nbytes],
            "data_offsets": [at, at + record.nbytes],
        }
        at += record.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // PAGE) * PAGE - 8
    return length.to_bytes(8, "little") + text.ljust(length)
