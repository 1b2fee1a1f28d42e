"""Tensors that are only addresses.

Knows: how views, joins and transpositions move the addresses of bytes that lie in files.
Does not know: safetensors, experts, models, or a single weight.

transformers describes how a checkpoint becomes a model with *operations* that run on real tensors
(stack, cat, transpose, chunk, reshape, ...). We let the very same operations run on `Strided`
values. What comes out says, for every element of a model parameter, where in which file it lies,
so the bytes can be read without ever running the conversion. torch hands each call over through
``__torch_function__``; a call that cannot be expressed as strided views raises `NotAView`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

MAX_PARTS = 4096  # a merge that shatters a tensor into more views than this is not worth following


class NotAView(Exception):
    """An operation that moves single elements about: no list of strided views can express it."""


class Strided:
    """What both kinds of address, one `View` and several joined, can do. Immutable.

    Names and arguments are those of `torch.Tensor`, because transformers' operations call them.
    """

    shape: torch.Size

    # ------------------------------------------------------------ the five primitive operations

    @abstractmethod
    def permute(self, *order: int) -> Strided: ...

    @abstractmethod
    def narrow(self, dim: int, start: int, length: int) -> Strided: ...

    @abstractmethod
    def divide(self, dim: int, inner: int) -> Strided:
        """Axis ``dim`` of size n becomes two axes (n / inner, inner)."""

    @abstractmethod
    def merge(self, dim: int) -> Strided:
        """Axes ``dim`` and ``dim + 1`` become one."""

    @abstractmethod
    def squeeze(self, dim: int) -> Strided: ...

    # ---------------------------------------------------------------- everything else from them

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return prod(self.shape)

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def contiguous(self) -> Strided:
        return self  # an order of bytes in memory, which an address does not have

    def unsqueeze(self, dim: int) -> Strided:
        dim = dim % (self.ndim + 1)
        if dim < self.ndim:
            return self.divide(dim, self.shape[dim])
        return self.divide(dim - 1, 1)

    def transpose(self, dim0: int, dim1: int) -> Strided:
        order = list(range(self.ndim))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        return self.permute(*order)

    def unbind(self, dim: int = 0) -> tuple[Strided, ...]:
        dim %= self.ndim
        return tuple(self.narrow(dim, i, 1).squeeze(dim) for i in range(self.shape[dim]))

    def split(self, split_size: int | Sequence[int], dim: int = 0) -> tuple[Strided, ...]:
        dim %= self.ndim
        total = self.shape[dim]
        if isinstance(split_size, int):
            starts = range(0, total, max(split_size, 1))
            split_size = [min(split_size, total - s) for s in starts]
        if sum(split_size) != total:
            raise NotAView(f"split of {total} into {list(split_size)}")
        ends = [sum(split_size[: i + 1]) for i in range(len(split_size))]
        return tuple(
            self.narrow(dim, end - size, size) for end, size in zip(ends, split_size, strict=True)
        )

    def chunk(self, chunks: int, dim: int = 0) -> tuple[Strided, ...]:
        return self.split(-(-self.shape[dim] // chunks), dim)

    def flatten(self, start_dim: int = 0, end_dim: int = -1) -> Strided:
        start, end = start_dim % self.ndim, end_dim % self.ndim
        return self.reshape(*self.shape[:start], -1, *self.shape[end + 1 :])

    def reshape(self, *shape: Any) -> Strided:
        wanted = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        if -1 in wanted:
            known = prod(n for n in wanted if n != -1)
            wanted[wanted.index(-1)] = self.numel() // max(known, 1)
        if prod(wanted) != self.numel() or self.numel() == 0:
            raise NotAView(f"reshape of {tuple(self.shape)} to {tuple(wanted)}")
        out: Strided = self
        for axis, old, new in _axis_groups(list(self.shape), wanted):
            if old == new:
                continue
            if not old or not new:  # only axes of size one come or go
                for _ in old or new:
                    out = out.squeeze(axis) if old else out.unsqueeze(axis)
                continue
            for _ in range(len(old) - 1):
                out = out.merge(axis)
            for i in range(len(new) - 1):
                out = out.divide(axis + i, prod(new[i + 1 :]))
        return out

    view = reshape

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(func, "__name__", str(func))
        mine: Callable[..., Any] | None = {"stack": stack, "cat": cat}.get(name)
        mine = mine or getattr(cls, name, None)
        if mine is None:
            raise NotAView(f"torch.{name}")
        return mine(*args, **(kwargs or {}))


@dataclass(frozen=True)
class View(Strided):
    """``shape`` elements of ``itemsize`` bytes, ``strides`` (in elements) apart, from byte
    ``start`` of file number ``file``. ``dtype`` is only carried along."""

    file: int
    start: int
    itemsize: int
    dtype: str
    shape: torch.Size
    strides: tuple[int, ...]

    @classmethod
    def whole(cls, file: int, start: int, itemsize: int, dtype: str, shape: Sequence[int]) -> View:
        """The address of a tensor that lies contiguous."""
        strides = tuple(prod(shape[i + 1 :]) for i in range(len(shape)))
        return cls(file, start, itemsize, dtype, torch.Size(shape), strides)

    @property
    def end(self) -> int:
        """One past the last byte."""
        last = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        return self.start + (last + 1) * self.itemsize

    @property
    def nbytes(self) -> int:
        return self.numel() * self.itemsize

    def _with(self, shape: Sequence[int], strides: Sequence[int], skip: int = 0) -> View:
        start = self.start + skip * self.itemsize
        size = torch.Size(shape)
        return View(self.file, start, self.itemsize, self.dtype, size, tuple(strides))

    def permute(self, *order: int) -> View:
        return self._with([self.shape[i] for i in order], [self.strides[i] for i in order])

    def narrow(self, dim: int, start: int, length: int) -> View:
        shape = [*self.shape]
        shape[dim] = length
        return self._with(shape, self.strides, start * self.strides[dim])

    def divide(self, dim: int, inner: int) -> View:
        if self.shape[dim] % inner:
            raise NotAView(f"axis of {self.shape[dim]} divided by {inner}")
        shape, strides = [*self.shape], [*self.strides]
        shape[dim : dim + 1] = [self.shape[dim] // inner, inner]
        strides[dim : dim + 1] = [self.strides[dim] * inner, self.strides[dim]]
        return self._with(shape, strides)

    def merge(self, dim: int) -> Strided:
        (outer, inner), (far, near) = self.shape[dim : dim + 2], self.strides[dim : dim + 2]
        if 1 not in (outer, inner) and far != inner * near:
            return _join(dim, self.unbind(dim))
        shape, strides = [*self.shape], [*self.strides]
        shape[dim : dim + 2] = [outer * inner]
        strides[dim : dim + 2] = [far if inner == 1 else near]
        return self._with(shape, strides)

    def squeeze(self, dim: int) -> View:
        dim %= self.ndim
        if self.shape[dim] != 1:
            return self
        keep = [i for i in range(self.ndim) if i != dim]
        return self.permute(*keep)


@dataclass(frozen=True)
class Joined(Strided):
    """``parts`` one after another along axis ``axis``."""

    axis: int
    parts: tuple[Strided, ...]
    shape: torch.Size

    @property
    def dtype(self) -> str:
        dtypes = {view.dtype for view in views(self)}
        if len(dtypes) > 1:
            raise NotAView(f"one tensor of {' and '.join(sorted(dtypes))}")
        return dtypes.pop()

    def _map(self, axis: int, change: Callable[[Strided], Strided]) -> Strided:
        return _join(axis, [change(part) for part in self.parts])

    def permute(self, *order: int) -> Strided:
        return self._map(
            [i % self.ndim for i in order].index(self.axis), lambda p: p.permute(*order)
        )

    def narrow(self, dim: int, start: int, length: int) -> Strided:
        if dim != self.axis:
            return self._map(self.axis, lambda p: p.narrow(dim, start, length))
        kept, at = [], 0
        for part in self.parts:
            first, last = max(start, at), min(start + length, at + part.shape[dim])
            if first < last:
                kept.append(part.narrow(dim, first - at, last - first))
            at += part.shape[dim]
        return _join(dim, kept)

    def unbind(self, dim: int = 0) -> tuple[Strided, ...]:
        # same answer as the inherited one, in time linear (not quadratic) in the number of parts
        dim %= self.ndim
        rows = [part.unbind(dim) for part in self.parts]
        if dim == self.axis:
            return tuple(row for of_part in rows for row in of_part)
        axis = self.axis - (dim < self.axis)
        return tuple(_join(axis, row) for row in zip(*rows, strict=True))

    def divide(self, dim: int, inner: int) -> Strided:
        if dim != self.axis:
            return self._map(self.axis + (dim < self.axis), lambda p: p.divide(dim, inner))
        if self.shape[dim] == inner:  # a new axis of one, not a cut
            return self._map(dim + 1, lambda p: p.divide(dim, p.shape[dim]))
        if all(part.shape[dim] % inner == 0 for part in self.parts):
            return self._map(dim, lambda p: p.divide(dim, inner))
        rows = self.split(inner, dim)  # no row is a run of whole parts
        if rows[-1].shape[dim] != inner:
            raise NotAView(f"axis of {self.shape[dim]} divided by {inner}")
        return _join(dim, [row.unsqueeze(dim) for row in rows])

    def merge(self, dim: int) -> Strided:
        if self.axis == dim + 1 and self.shape[dim] > 1:
            return _join(dim, self.unbind(dim))
        return self._map(self.axis - (dim < self.axis), lambda p: p.merge(dim))

    def squeeze(self, dim: int) -> Strided:
        dim %= self.ndim
        if self.shape[dim] != 1:
            return self
        if dim == self.axis:
            return self.parts[0].squeeze(dim)
        return self._map(self.axis - (dim < self.axis), lambda p: p.squeeze(dim))


def cat(tensors: Sequence[Strided], dim: int = 0) -> Strided:
    """What `torch.cat` does, for addresses."""
    dim %= tensors[0].ndim
    frames = {(*t.shape[:dim], *t.shape[dim + 1 :]) for t in tensors}
    if len(frames) > 1:
        raise NotAView(f"cat of different shapes {sorted(tuple(t.shape) for t in tensors)[::-1]}")
    return _join(dim, tensors)


def stack(tensors: Sequence[Strided], dim: int = 0) -> Strided:
    """What `torch.stack` does, for addresses."""
    shapes = sorted({tuple(t.shape) for t in tensors})
    if len(shapes) > 1:
        raise NotAView(f"stack of different shapes {shapes}")
    dim %= tensors[0].ndim + 1
    return _join(dim, [t.unsqueeze(dim) for t in tensors])


def views(tensor: Strided) -> Iterator[View]:
    """Every view a tensor is made of."""
    if isinstance(tensor, Joined):
        for part in tensor.parts:
            yield from views(part)
    elif isinstance(tensor, View):
        yield tensor


def views_along(tensor: Strided, axis: int, unite: bool = True) -> list[View]:
    """The views that give ``tensor`` when concatenated along ``axis``, neighbours united."""
    if isinstance(tensor, View):
        return [tensor]
    if not isinstance(tensor, Joined) or tensor.axis != axis:
        raise NotAView("parts joined along two axes")
    united: list[View] = []
    for view in (v for part in tensor.parts for v in views_along(part, axis, unite)):
        if unite and united and _continues(united[-1], view, axis):
            shape = [*view.shape]
            shape[axis] += united[-1].shape[axis]
            united[-1] = united[-1]._with(shape, united[-1].strides)
        else:
            united.append(view)
    return united


def _continues(a: View, b: View, axis: int) -> bool:
    """Whether ``b`` is simply the next rows of ``a``."""
    next_row = a.start + a.shape[axis] * a.strides[axis] * a.itemsize
    return (a.file, a.dtype, a.strides, next_row) == (b.file, b.dtype, b.strides, b.start)


def _join(axis: int, parts: Sequence[Strided]) -> Strided:
    if len(parts) == 1:
        return parts[0]
    if len(parts) > MAX_PARTS:
        raise NotAView(f"a tensor in {len(parts)} parts")
    shape = [*parts[0].shape]
    shape[axis] = sum(part.shape[axis] for part in parts)
    return Joined(axis, tuple(parts), torch.Size(shape))


def _axis_groups(
    old: Sequence[int], new: Sequence[int]
) -> Iterator[tuple[int, list[int], list[int]]]:
    """Smallest runs of old axes that become a run of new ones: (first new axis, old, new)."""
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while prod(old[i0:i]) != prod(new[j0:j]):
            if prod(old[i0:i]) < prod(new[j0:j]):
                i += 1
            else:
                j += 1
        yield j0, list(old[i0:i]), list(new[j0:j])
