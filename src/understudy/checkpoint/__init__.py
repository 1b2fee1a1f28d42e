"""A Hugging Face checkpoint as it lies on disk: byte ranges of every expert, nothing unpacked.

Knows: ``config.json``, safetensors headers and transformers' conversion rules.
Does not know: how or when bytes are read, or what is done with them.

`files` finds and checks the files, `strided` lets operations run on addresses, `layouts` turns
names into byte ranges; `quantized` knows what quantised checkpoints call their parts, `packed` the
folders that `understudy pack` writes. This file puts them together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any

from understudy.checkpoint import files as _files
from understudy.checkpoint import layouts as _layouts
from understudy.checkpoint import packed as _packed
from understudy.checkpoint import quantized as _quantized
from understudy.checkpoint.files import TensorInfo
from understudy.checkpoint.layouts import ExpertsModule
from understudy.checkpoint.packed import Manifest
from understudy.checkpoint.quantized import Scheme
from understudy.core import STORED, ExpertId, ExpertLayout

__all__ = ["Checkpoint", "ExpertsModule", "Manifest", "TensorInfo"]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Every number in it has been checked against the files.

    ``files``: in the order that `ByteRange.file` counts. ``config``: transformers' configuration,
    without a word of quantisation. ``scheme``: how experts are quantised, where the checkpoint came
    so; ``manifest``: where `understudy pack` wrote it.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    config: Any
    scheme: Scheme | None = None
    manifest: Manifest | None = None

    @classmethod
    def open(cls, source: str | Path) -> Checkpoint:
        """Open a local folder or a hub id (``HF_HOME`` and ``HF_HUB_OFFLINE`` are honoured).

        Reads the configuration, the index and all headers; no weights. Anything that is missing,
        damaged, pickled or quantised in an unknown way raises a `CheckpointError` of one line that
        names the cure.
        """
        path = _files.find(source)
        config, raw = _files.read_config(path)
        scheme = _quantized.scheme_of(path, raw)
        _quantized.forget(config)
        manifest = None
        if (path / _files.MANIFEST).is_file():
            manifest = _packed.read_manifest(path)
            names, tensors = _packed.read_tensors(path, manifest)
        else:
            names, tensors = _files.read_tensors(path)
        return cls(path, names, MappingProxyType(tensors), config, scheme, manifest)

    @property
    def format(self) -> str:
        """The weight format of the experts."""
        if self.manifest is not None:
            return self.manifest.format
        return self.scheme.format if self.scheme is not None else STORED

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, used by the model or not."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def layouts(self, model: Any, modules: Sequence[ExpertsModule]) -> dict[ExpertId, ExpertLayout]:
        """How each expert lies on disk.

        ``model`` is the transformers model, on any device (meta will do); the expert parameters
        may have been removed from it, their names and shapes come from ``modules``.
        """
        if self.manifest is not None:
            return _packed.layouts(self.manifest, self.tensors, modules)
        return _layouts.layouts(self.tensors, model, modules, self.scheme)

    def dense(self, model: Any, modules: Sequence[ExpertsModule]) -> tuple[TensorInfo, ...]:
        """The stored tensors that the model keeps resident; of quantised ones the codes."""
        return tuple(info for _, info, _ in self.dense_parts(model, modules))

    def dense_parts(
        self, model: Any, modules: Sequence[ExpertsModule]
    ) -> list[tuple[str, TensorInfo, TensorInfo | None]]:
        """The same with the name that a plain checkpoint gives each, and the scales of codes."""
        return _layouts.dense(self.tensors, model, modules, self.scheme)

    def dense_bytes(self, model: Any, modules: Sequence[ExpertsModule]) -> dict[str, int]:
        """Bytes of the stored tensors that the model keeps resident, by safetensors dtype, so that
        a caller can work out what they take in another one. Codes count as the numbers that they
        are unpacked to, in fp32."""
        total: Counter[str] = Counter()
        for _, tensor, scales in self.dense_parts(model, modules):
            if scales is None or self.scheme is None:
                total[tensor.dtype] += tensor.nbytes
            else:
                total["F32"] += 4 * self.scheme.per_code * prod(tensor.shape)
        return dict(total)
