"""A Hugging Face checkpoint as it lies on disk: byte ranges of every expert, nothing unpacked.

Knows: ``config.json``, safetensors headers and transformers' conversion rules.
Does not know: how or when bytes are read, or what is done with them.

`files` finds and checks the files, `strided` lets operations run on addresses, `layouts` turns
names into byte ranges. This file puts the three together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from understudy.checkpoint import files as _files
from understudy.checkpoint import layouts as _layouts
from understudy.checkpoint.files import TensorInfo
from understudy.checkpoint.layouts import ExpertsModule
from understudy.core import ExpertId, ExpertLayout

__all__ = ["Checkpoint", "ExpertsModule", "TensorInfo"]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. Every number in it has been checked against the files.

    ``files``: in the order that `ByteRange.file` counts. ``config``: transformers' configuration.
    """

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    config: Any

    @classmethod
    def open(cls, source: str | Path) -> Checkpoint:
        """Open a local folder or a hub id (``HF_HOME`` and ``HF_HUB_OFFLINE`` are honoured).

        Reads the configuration, the index and all headers; no weights. Anything that is missing,
        damaged, pickled or quantised raises a `CheckpointError` of one line that names the cure.
        """
        path = _files.find(source)
        config = _files.read_config(path)
        names, tensors = _files.read_tensors(path)
        return cls(path, names, MappingProxyType(tensors), config)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, used by the model or not."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def layouts(self, model: Any, modules: Sequence[ExpertsModule]) -> dict[ExpertId, ExpertLayout]:
        """How each expert lies on disk.

        ``model`` is the transformers model, on any device (meta will do); the expert parameters
        may have been removed from it, their names and shapes come from ``modules``.
        """
        return _layouts.layouts(self.tensors, model, modules)

    def dense_bytes(self, model: Any, modules: Sequence[ExpertsModule]) -> dict[str, int]:
        """Bytes of the stored tensors that the model keeps resident, by safetensors dtype, so that
        a caller can work out what they take in another one."""
        total: Counter[str] = Counter()
        for tensor in _layouts.dense(self.tensors, model, modules):
            total[tensor.dtype] += tensor.nbytes
        return dict(total)
