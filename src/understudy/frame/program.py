"""A compiled layer as a list of steps in C: inductor's loops without inductor's Python.

Knows: addresses, which of them belong to arguments and which to memory of one call. Does not know:
what a layer computes, transformers, experts.

What inductor compiles is a Python function that allocates buffers, calls some ten C loops on them
and our operators in between; for one token the calls cost more than the loops. So it is run once
while a `Tape` notes every call and every address. Afterwards a `Program` repeats the same calls
with other addresses: all loops between two opaque operators are one call of `understudy_steps`.
Shapes never change (one token), so neither do the steps.

A layer that does anything the tape cannot note keeps inductor's own function.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from understudy import native

ALIGNED = 64  # buffers of one call lie so many bytes apart, or a multiple

_tape: ContextVar[Tape | None] = ContextVar("understudy_tape", default=None)


class NotNoted(Exception):
    """The tape cannot note this; the text says what."""


# ------------------------------------------------------------------------------ what was noted


class Spot(NamedTuple):
    """So many bytes into argument number ``base``, or (-1) into the memory of the call."""

    base: int
    offset: int


class View(NamedTuple):
    """A tensor at a spot of the memory of the call; strides in elements."""

    spot: Spot
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Native:
    """One step in C. ``kind``, ``numbers``: as layer.c reads them; ``library``: file of a loop."""

    kind: int
    spots: tuple[Spot, ...]
    numbers: tuple[int, ...] = ()
    library: str = ""


@dataclass(frozen=True, slots=True)
class Opaque:
    """An operator of ours: its name, what it reads, and where its answer is expected."""

    name: str
    reads: tuple[View, ...]
    answer: Spot
    nbytes: int


@dataclass(frozen=True, slots=True)
class Notes:
    """Everything a `Program` needs. ``nbytes``: memory of one call; ``result``: the layer's."""

    steps: tuple[Native | Opaque, ...]
    nbytes: int
    result: View


# ----------------------------------------------------------------------------------- the tape


class Loop:
    """One of inductor's compiled loops: called as before, noted while there is a tape."""

    def __init__(self, call: Callable[..., Any], types: Sequence[str]) -> None:
        self._call, self.types = call, types
        self.library: str = call.__self__.__file__  # type: ignore[attr-defined]

    def __call__(self, *args: Any) -> None:
        tape = _tape.get()
        if tape is not None:
            tape.loop(self, args)
        self._call(*args)


@contextmanager
def noting_loops() -> Iterator[None]:
    """While inside, every loop that inductor loads is a `Loop`."""
    from torch._inductor.codecache import CppPythonBindingsCodeCache as Cache

    original: Any = Cache.load_pybinding

    def load(cls: Any, types: Sequence[str], source: str, *args: Any, **kwargs: Any) -> Any:
        return Loop(original.__func__(cls, types, source, *args, **kwargs), types)

    Cache.load_pybinding = classmethod(load)  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        Cache.load_pybinding = original  # type: ignore[method-assign]


@dataclass(slots=True)
class _Region:
    """Addresses that belong together: an argument, or (``at``) memory of the call."""

    start: int
    stop: int
    base: int
    at: int = 0
    keep: Any = field(default=None, repr=False)  # so that nobody gets the same address meanwhile


class Tape(TorchDispatchMode):
    """Watches one call of compiled code. ``arguments``: all tensors it is given, in order."""

    def __init__(self, arguments: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Native | Opaque] = []
        self.nbytes = 0
        self._regions = [_region_of(t, base) for base, t in enumerate(arguments)]

    def __enter__(self) -> Tape:
        self._token = _tape.set(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        _tape.reset(self._token)

    def notes(self, result: torch.Tensor) -> Notes:
        return Notes(tuple(self.steps), self.nbytes, self._view(result))

    def loop(self, loop: Loop, args: Sequence[Any]) -> None:
        if len(args) > native.MOST_PLACES or not all(t.endswith("*") for t in loop.types):
            raise NotNoted("a loop whose arguments are not a few pointers")
        for tensor, kind in zip(args, loop.types, strict=True):
            if not kind.startswith("const "):
                self._spot(tensor)  # written here, so what else it reads of it is known
        spots = [self._spot(tensor, known=True) for tensor in args]
        self.steps.append(Native(native.LOOP, tuple(spots), library=loop.library))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.name().partition(".")[0]
        if func.is_view or name in ("aten::empty", "aten::empty_strided"):
            return func(*args, **(kwargs or {}))
        note = _NOTED.get(name)
        if note is None:
            raise NotNoted(name)
        out = func(*args, **(kwargs or {}))  # torch keeps us out of what it calls itself
        note(self, name, args, out)
        return out

    # ------------------------------------------------------------------------------- operators

    def _opaque(self, name: str, args: Sequence[Any], out: torch.Tensor) -> None:
        *read, _number = args
        reads = tuple(self._view(t) for t in read)
        answer = self._spot(out)
        self.steps.append(Opaque(name.rpartition(":")[2], reads, answer, out.nbytes))

    def _products(self, name: str, args: Sequence[Any], out: torch.Tensor) -> None:
        x, weights = args
        if len(weights) > native.MOST_MATRICES or not all(w.is_contiguous() for w in weights):
            raise NotNoted("more matrices than fit, or some that lie in pieces")
        lines = [w.shape[0] for w in weights]
        at = self._spot(out)
        parts = [Spot(at.base, at.offset + sum(lines[:i]) * x.itemsize) for i in range(len(lines))]
        spots = (self._spot(x, known=True), *parts, *(self._spot(w, known=True) for w in weights))
        kind = native.KINDS[native.name_of(x.dtype)]
        numbers = (x.shape[1], kind, x.itemsize, *lines)
        self.steps.append(Native(native.PRODUCTS, spots, numbers))

    def _topk(self, name: str, args: Sequence[Any], out: Any) -> None:
        scores, k, *how = args
        plain = scores.numel() == scores.shape[-1] and scores.dtype == torch.float32
        if not plain or how[:1] not in ([], [-1]) or not all(how[1:]):
            raise NotNoted("topk of something else than one row of fp32")
        values, ids = out
        spots = (self._spot(scores, known=True), self._spot(values), self._spot(ids))
        self.steps.append(Native(native.TOPK, spots, (scores.numel(), k)))

    # ------------------------------------------------------------------------------- addresses

    def _spot(self, tensor: torch.Tensor, known: bool = False) -> Spot:
        """Where ``tensor`` begins. ``known``: it is read, so somebody must have written it."""
        address = tensor.data_ptr()
        for region in self._regions:
            if region.start <= address < region.stop:
                return Spot(region.base, region.at + address - region.start)
        if known:
            raise NotNoted("a constant that is no parameter")
        room = tensor.untyped_storage()
        region = _Region(room.data_ptr(), room.data_ptr() + room.nbytes(), -1, self.nbytes, room)
        self.nbytes += -(-room.nbytes() // ALIGNED) * ALIGNED
        self._regions.append(region)
        return Spot(-1, region.at + address - region.start)

    def _view(self, tensor: torch.Tensor) -> View:
        spot = self._spot(tensor, known=True)
        if spot.base >= 0:
            raise NotNoted("an operator that reads an argument")
        return View(spot, native.name_of(tensor.dtype), tuple(tensor.shape), tensor.stride())


_NOTED: dict[str, Callable[..., None]] = {
    "understudy::products": Tape._products,
    "understudy::attend": Tape._opaque,
    "understudy::experts": Tape._opaque,
    "aten::topk": Tape._topk,
}


def _region_of(tensor: torch.Tensor, base: int) -> _Region:
    return _Region(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, base, 0, tensor)


# ------------------------------------------------------------------------------------- replaying

# Answers one opaque operator: reads its views of the memory, and whatever belongs to the call.
Answer = Callable[["Memory", Any], torch.Tensor]


class Memory:
    """What one call writes to: loops by address, operators as tensors."""

    __slots__ = ("_typed", "address", "bytes")

    def __init__(self, nbytes: int) -> None:
        self.bytes = torch.empty(nbytes, dtype=torch.uint8)
        self.address = self.bytes.data_ptr()
        self._typed: dict[str, torch.Tensor] = {}

    def tensor(self, view: View) -> torch.Tensor:
        typed = self._typed.get(view.dtype)
        if typed is None:
            typed = self._typed[view.dtype] = self.bytes.view(getattr(torch, view.dtype))
        return typed.as_strided(view.shape, view.strides, view.spot.offset // typed.itemsize)


class _Stretch:
    """Steps in C that follow each other, as one call."""

    def __init__(self, steps: Sequence[Native], memory_base: int, loops: dict[str, Any]) -> None:
        self.count = len(steps)
        self._held = []  # C holds addresses only
        self._array = (native.Step * self.count)()
        for c, step in zip(self._array, steps, strict=True):
            places = (native.Place * len(step.spots))(
                *[native.Place(memory_base if s.base < 0 else s.base, s.offset) for s in step.spots]
            )
            numbers = (ctypes.c_int64 * len(step.numbers))(*step.numbers)
            if step.library:
                c.function = ctypes.cast(loops[step.library].kernel, ctypes.c_void_p)
            c.places, c.numbers = places, numbers
            c.kind, c.count = step.kind, len(step.spots)
            self._held += [places, numbers]
        self.address = ctypes.addressof(self._array)


class Program:
    """Notes that can be carried out. Holds nothing of a call, so any number may run at once."""

    def __init__(
        self, notes: Notes, arguments: int, opaque: Mapping[str, Callable[[Opaque], Answer]]
    ) -> None:
        """``opaque``: name of an operator -> what makes its answers of a step."""
        lib = native.library()
        assert lib is not None
        self.notes, self.arguments = notes, arguments
        self._steps = lib.understudy_steps
        self._loops = {
            path: ctypes.CDLL(path)
            for path in {s.library for s in notes.steps if isinstance(s, Native) and s.library}
        }
        self._parts: list[_Stretch | tuple[int, Answer]] = []
        self._bases = ctypes.c_void_p * (arguments + 1 + _opaques(notes))
        self._plan(opaque)

    def _plan(self, opaque: Mapping[str, Callable[[Opaque], Answer]]) -> None:
        """Cut the steps at the operators; an operator's answer is a base of its own, from where
        later steps read it."""
        base, run = self.arguments + 1, list[Native]()
        moved: dict[tuple[int, int], int] = {}
        for step in self.notes.steps:
            if isinstance(step, Native):
                run.append(_moved(step, moved))
                continue
            if run:
                self._parts.append(_Stretch(run, self.arguments, self._loops))
            run = []
            if any(_inside(view.spot, moved) for view in step.reads):
                raise NotNoted("an operator that reads what another one answered")
            moved[step.answer.offset, step.answer.offset + step.nbytes] = base
            self._parts.append((base, opaque[step.name](step)))
            base += 1
        if run:
            self._parts.append(_Stretch(run, self.arguments, self._loops))
        if _inside(self.notes.result.spot, moved):
            raise NotNoted("a result that lies in an operator's answer")

    def bases(self, arguments: Sequence[torch.Tensor]) -> Any:
        """The addresses of a call, as far as they are known before it."""
        return self._bases(*[t.data_ptr() for t in arguments])

    def run(self, bases: Any, call: Any) -> torch.Tensor:
        """``bases`` and ``call`` belong to this call."""
        memory, threads = Memory(self.notes.nbytes), torch.get_num_threads()
        bases[self.arguments] = memory.address
        held = []
        for part in self._parts:
            if isinstance(part, _Stretch):
                if self._steps(part.address, part.count, bases, threads):
                    raise MemoryError("no memory for the inputs of a matrix")
            else:
                base, answer = part
                out = answer(memory, call)
                held.append(out)
                bases[base] = out.data_ptr()
        return memory.tensor(self.notes.result).clone()


def _opaques(notes: Notes) -> int:
    return sum(isinstance(step, Opaque) for step in notes.steps)


def _moved(step: Native, moved: dict[tuple[int, int], int]) -> Native:
    """The step with what it reads of an operator's answer named by that answer's base."""

    def spot(s: Spot) -> Spot:
        found = _inside(s, moved)
        return s if found is None else Spot(moved[found], s.offset - found[0])

    return Native(step.kind, tuple(map(spot, step.spots)), step.numbers, step.library)


def _inside(spot: Spot, moved: Iterable[tuple[int, int]]) -> tuple[int, int] | None:
    """The answer, from byte to byte of the call's memory, in which ``spot`` lies."""
    if spot.base >= 0:
        return None
    return next((span for span in moved if span[0] <= spot.offset < span[1]), None)
