"""Weight formats: how one matrix of an expert is written in few bits, and read back.

Knows: codes, scales, rounding. Does not know: experts, files, caching, or who multiplies; a native
kernel may compute from the codes directly, `unpack` is what it is compared with.

A matrix is always ``[out, in]``, as in y = x W^T. It becomes *codes*, and *scales* where the format
has any. Wherever they lie, codes go by the name of the parameter and scales by that name and
``_scales``, which is why `WeightFormat.pack` calls them "" and "_scales".
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

import torch

from understudy.core import STORED, UnderstudyError
from understudy.registry import FORMATS

CODES, SCALES = "", "_scales"

Packed = Mapping[str, torch.Tensor]


class CannotPack(UnderstudyError):
    """This matrix cannot be written in this format."""


class WeightFormat(Protocol):
    """One way to write a matrix.

    ``exact``: nothing is lost by computing in it, because checkpoints come in it; the others are
    made from a checkpoint and are *lossy*. ``bits``: of one code.
    """

    @property
    def name(self) -> str: ...
    @property
    def exact(self) -> bool: ...
    @property
    def bits(self) -> int: ...

    def pack(self, matrix: torch.Tensor) -> Packed:
        """[out, in] -> codes and scales. `CannotPack` where the shape or a weight forbids it."""
        ...

    def unpack(
        self, codes: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """[out, in] in ``dtype``: each weight worked out in fp32 and rounded once."""
        ...

    def nbytes(self, out: int, inner: int) -> int:
        """Bytes of codes and scales of a matrix of this shape."""
        ...


def get(name: str) -> WeightFormat:
    """The format called ``name``; `UnknownName` suggests the nearest one."""
    found: WeightFormat = FORMATS.get(name)
    return found


def is_exact(name: str) -> bool:
    """Whether computing from experts in this format loses nothing that the checkpoint says."""
    return name == STORED or get(name).exact


def lossy_names() -> tuple[str, ...]:
    """Formats that a checkpoint can be packed into, in the order of the registry."""
    return tuple(name for name in FORMATS.builtin_names if not get(name).exact)


def packed(codes: torch.Tensor, scales: torch.Tensor | None = None) -> Packed:
    """The two parts under their names."""
    return MappingProxyType({CODES: codes} if scales is None else {CODES: codes, SCALES: scales})


def in_fp32(matrix: torch.Tensor, name: str) -> torch.Tensor:
    """The matrix to be packed, every weight a finite number; ``name``: of the format."""
    if matrix.ndim != 2:
        raise CannotPack(f"{name} packs matrices, not a tensor of shape {list(matrix.shape)}")
    wide = matrix.float()
    if not bool(torch.isfinite(wide).all()):
        raise CannotPack(
            f"{name} cannot hold infinite weights or NaN, and this checkpoint has some: "
            "download it again, or run it as stored"
        )
    return wide


def wide_enough(dtype: torch.dtype) -> torch.dtype:
    """In what weights are worked out before they are rounded to ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32
