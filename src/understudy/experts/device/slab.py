"""How an expert lies in a slot of the device and in the pinned memory it is copied from.

Knows: parameters, shapes, offsets. Does not know: where slabs are, or how they move.

On disk an expert lies as its checkpoint was written: in one piece or several, at any offset. Here
all experts of a layer lie alike, in one contiguous piece, so that one copy moves an expert and one
kernel finds any of them by the number of its slot:

    slot  |gate_up_proj ....|pad|gate_up_proj_scales|pad|down_proj ......|pad| ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from understudy.core import STORED, ExpertLayout
from understudy.experts.store import Weights

ALIGNED = 256  # bytes: a whole line of device memory, and any vector load


@dataclass(frozen=True, slots=True)
class Field:
    """One parameter: contiguous, ``start`` bytes into the slab. ``axis``: along which its pieces
    follow one another, which is the output's."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    axis: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Slab:
    """The layout that all experts of one MoE layer share. ``nbytes`` is a multiple of `ALIGNED`."""

    fields: Mapping[str, Field]
    nbytes: int

    @classmethod
    def of(cls, layout: ExpertLayout, *, transposed: bool) -> Slab:
        """``transposed``: of the module; codes of a weight format are ``[out, in]`` anyway."""
        fields, start = {}, 0
        for name, pieces in layout.params.items():
            axis = _axis(name, layout, transposed)
            shape = _joined([p.shape for p in pieces], axis)
            field = Field(name, getattr(torch, pieces[0].dtype), shape, start, axis)
            fields[name] = field
            start += -(-field.nbytes // ALIGNED) * ALIGNED
        return cls(fields, start)

    def views(self, memory: torch.Tensor) -> Weights:
        """The parameters in ``memory``, uint8 [>= nbytes]: what `ExpertMlp` takes."""
        found = Weights()
        for field in self.fields.values():
            part = memory[field.start : field.start + field.nbytes]
            found[field.name] = (part.view(field.dtype).view(field.shape),)
        return found

    def pack(self, weights: Mapping[str, Sequence[torch.Tensor]], memory: torch.Tensor) -> None:
        """Write an expert, as the store shows it, into ``memory``."""
        for name, (whole,) in self.views(memory).items():
            axis, start = self.fields[name].axis, 0
            for piece in weights[name]:
                whole.narrow(axis, start, piece.shape[axis]).copy_(piece)
                start += piece.shape[axis]


def _axis(name: str, layout: ExpertLayout, transposed: bool) -> int:
    matrix = len(layout.params[name][0].shape) > 1
    return 1 if matrix and transposed and layout.format == STORED else 0


def _joined(shapes: Sequence[tuple[int, ...]], axis: int) -> tuple[int, ...]:
    first = list(shapes[0])
    first[axis] = sum(s[axis] for s in shapes)
    return tuple(first)
