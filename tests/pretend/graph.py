"""Recorded device work: a tape of what torch and kernels are asked for, repeated on the CPU.

Knows: torch's dispatcher, storages, streams. Does not know: who records what.

As on a device, recording runs nothing. Torch is asked only what shapes would come out; the results
are new memory, full of 0xFF until the first `replay`, at addresses that stay. Memory that others
made the tape does not keep alive: as a real graph it knows addresses, and it says so when the
memory behind one was freed. What a capture refuses (waiting for the device, random numbers, shapes
that depend on data, work outside the recording) raises `NotRecordable`, and so does `end` then.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from pretend.races import Race, caller
from pretend.streams import NotRecordable, PretendEvent, PretendStream

if TYPE_CHECKING:
    from pretend import Pretend

aten = torch.ops.aten
HOST_READS = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu}
HOST_COPIES = {torch.tensor, torch.as_tensor, torch.asarray}  # to a device, where one is named
VIEWS = {aten._unsafe_view.default}  # a view that its schema does not call one
MADE_OF_HOST_DATA = {aten.lift_fresh.default, aten.lift.default}


class PretendGraph:
    """See `experts.device.Graph`."""

    def __init__(self, device: Pretend) -> None:
        self.device = device
        self.recorded = False
        self.invalid = False
        self._stream = device.named_stream("the recorded stream")
        self._tape: list[Callable[[Replay], None]] = []
        self._own: dict[int, torch.UntypedStorage] = {}  # storages made by the recording
        self._joined: list[PretendStream] = []
        self._branches: dict[PretendStream, PretendStream] = {}
        self._inside = ExitStack()

    def begin(self) -> None:
        device = self.device
        with device.lock:
            if self.recorded or self._joined:
                raise NotRecordable("a graph is recorded once")
            device.refuse_while_recording("to record another graph")
            device.drain()
            self._stream.clock.join(device.host)
            device.recordings[threading.get_ident()] = self
            self.join(self._stream)
        self._inside.enter_context(self._stream)
        self._inside.enter_context(_HostReads(self))
        self._inside.enter_context(_Recorder(self))

    def end(self) -> None:
        self._inside.close()
        with self.device.lock:
            del self.device.recordings[threading.get_ident()]
            for stream in self._joined:
                stream.recording = None
            if self.invalid:
                raise NotRecordable("the recording is invalid: something in it was refused")
            for stream in self._joined:
                if not self._stream.clock.covers(stream.clock):
                    raise NotRecordable(f"{stream.name} was not joined again before the end")
            self.recorded = True
            self.device.drain()

    def replay(self) -> None:
        device = self.device
        with device.lock:
            device.refuse_while_recording("to replay a graph")
            if not self.recorded:
                raise NotRecordable("replayed before it was recorded")
            replay = Replay(device, self._stream, device.compute, self._branches)
            with torch.inference_mode():
                for step in self._tape:
                    step(replay)

    # --------------------------------------------------------- what streams are asked for meanwhile

    def asked_copy(self, stream: PretendStream, to: torch.Tensor, source: torch.Tensor) -> None:
        self._count(stream)
        kept_to, kept_source = self.keep(to), self.keep(source)
        self._tape.append(lambda replay: replay.on(stream).copy(kept_to(), kept_source()))

    def asked_read(self, stream: PretendStream, memory: torch.Tensor) -> None:
        kept = self.keep(memory)
        self._tape.append(lambda replay: replay.on(stream).reads(kept()))

    def asked_event(self, stream: PretendStream, event: PretendEvent) -> None:
        def record(replay: Replay) -> None:
            replay.events[event] = replay.on(stream).record()

        self._tape.append(record)

    def asked_wait(self, stream: PretendStream, event: PretendEvent) -> None:
        if stream.recording is None:
            self.join(stream)
        stream.follow(event)
        self._tape.append(lambda replay: replay.on(stream).wait(replay.events[event]))

    def asked_launch(
        self, stream: PretendStream, kernel: Any, grid: Any, args: Any, options: Any
    ) -> None:
        self._count(stream)
        args, options = self._keep_all(args), self._keep_all(options)

        def launch(replay: Replay) -> None:
            with replay.on(stream):
                replay.device.launch(kernel, grid, *_found(args), **_found(options))

        self._tape.append(launch)

    def asked_torch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operator of torch: what it would give, without computing it."""
        if func in MADE_OF_HOST_DATA:
            return self._host_data(func, args)
        if func.is_view or func in VIEWS:
            return func(*args, **kwargs)  # addresses only: nothing to repeat
        if _is_random(func, args, kwargs):
            self.refuse(f"{func}: random numbers")
        if func in (aten.index_put_.default, aten.index_put.default) and _masked(args):
            self.refuse(f"{func} with a mask: its shape depends on data")
        out, fresh = self._outputs(func, args, kwargs)
        self._tape.append(self._operator(func, args, kwargs, fresh))
        return out

    def join(self, stream: PretendStream) -> None:
        stream.recording = self
        self._joined.append(stream)

    def refuse(self, what: str) -> None:
        self.invalid = True
        raise NotRecordable(f"{what}: not possible while a graph is recorded (at {caller()})")

    def keep(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """How to find this memory again. Only what the recording made is kept alive."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._own:
            return lambda: tensor
        return _Address(tensor)

    # --------------------------------------------------------------------------------- torch's part

    def _operator(
        self, func: Any, args: Any, kwargs: Any, fresh: dict[int, torch.Tensor]
    ) -> Callable[[Replay], None]:
        stream = self.device.compute
        if stream.recording is not self:
            self.refuse(f"{func} on {stream.name}, which waits for no event of the recording")
        self._count(stream)
        args, kwargs = self._keep_all(args), self._keep_all(kwargs)

        def run(replay: Replay) -> None:
            with replay.on(stream):
                results = _flat([func(*_found(args), **_found(kwargs))])
                for place, memory in fresh.items():
                    memory.copy_(results[place])

        return run

    def _outputs(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, dict[int, torch.Tensor]]:
        """What the operator returns: arguments that it writes to, and new memory for the rest, by
        its place among all tensors returned."""
        shapes = self._shapes(func, args, kwargs)
        single = not isinstance(shapes, (tuple, list))
        written = _written(func, args, kwargs)
        fresh: dict[int, torch.Tensor] = {}
        count = 0

        def real(shape: Any) -> Any:
            nonlocal count
            if isinstance(shape, (tuple, list)):
                return type(shape)(real(s) for s in shape)
            if not isinstance(shape, torch.Tensor):
                return shape
            if count not in written:
                fresh[count] = self._memory(shape)
            count += 1
            return written.get(count - 1, fresh.get(count - 1))

        found = real([shapes] if single else shapes)
        return (found[0] if single else found), fresh

    def _shapes(self, func: Any, args: Any, kwargs: Any) -> Any:
        def shape_of(tensor: torch.Tensor) -> torch.Tensor:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)

        with _disable_current_modes(), FakeTensorMode():
            fake_args, fake_kwargs = tree_map_only(torch.Tensor, shape_of, (args, kwargs))
            try:
                return func(*fake_args, **fake_kwargs)
            except (DataDependentOutputException, DynamicOutputShapeException):
                self.refuse(f"{func}: its result depends on data that the host would wait for")

    def _memory(self, shape: torch.Tensor) -> torch.Tensor:
        memory = torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype)
        storage = memory.untyped_storage()
        torch.empty(0, dtype=torch.uint8).set_(storage).fill_(0xFF)
        self._own[storage._cdata] = storage
        return memory

    def _host_data(self, func: Any, args: Any) -> torch.Tensor:
        """``torch.tensor(data)``: one number is an argument of a kernel, more would be copied."""
        if args[0].dim() > 0:
            self.refuse("to make a tensor of host data")
        storage = args[0].untyped_storage()
        self._own[storage._cdata] = storage
        return func(*args)

    def _count(self, stream: PretendStream) -> None:
        stream.clock[stream.number] = stream.clock.get(stream.number, 0) + 1

    def _keep_all(self, tree: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda tensor: _Kept(self.keep(tensor)), tree)


@dataclass(slots=True)
class Replay:
    """One repetition: the recorded stream is the one in use now, the others are branches of it."""

    device: Pretend
    recorded: PretendStream
    now: PretendStream
    branches: dict[PretendStream, PretendStream]
    events: dict[PretendEvent, PretendEvent] = field(default_factory=dict)

    def on(self, stream: PretendStream) -> PretendStream:
        if stream is self.recorded:
            return self.now
        if stream not in self.branches:
            self.branches[stream] = self.device.named_stream(f"a recorded branch ({stream.name})")
        return self.branches[stream]


class _Address:
    """A tensor over memory that may be freed by those who own it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._dtype = tensor.dtype
        self._shape = (tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride()))
        self._named = f"{tensor.dtype} {tuple(tensor.shape)} used at {caller()}"

    def __call__(self) -> torch.Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            raise Race(f"the graph uses memory that was freed: {self._named}")
        return torch.empty(0, dtype=self._dtype).set_(storage, *self._shape)


@dataclass(frozen=True, slots=True)
class _Kept:
    find: Callable[[], torch.Tensor]


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: PretendGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._can_decompose() and func not in VIEWS:  # e.g. linear, in inference mode
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return self._graph.asked_torch(func, args, kwargs)


class _HostReads(TorchFunctionMode):
    """What never comes to the dispatcher: reads of CPU memory, and on which device numbers of the
    host are asked for. One that stays there is an argument of a kernel."""

    def __init__(self, graph: PretendGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in HOST_READS:
            self._graph.refuse(f"Tensor.{func.__name__}")
        named = (kwargs or {}).get("device") is not None
        if func in HOST_COPIES and named and not isinstance(args[0], torch.Tensor):
            self._graph.refuse(f"torch.{func.__name__} on a device: a copy that is waited for")
        return func(*args, **(kwargs or {}))


def _found(tree: Any) -> Any:
    return tree_map_only(_Kept, lambda kept: kept.find(), tree)


def _flat(results: Any) -> list[torch.Tensor]:
    found = []
    for result in results:
        if isinstance(result, (tuple, list)):
            found += _flat(result)
        elif isinstance(result, torch.Tensor):
            found.append(result)
    return found


def _argument(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """What the schema's argument ``name`` is in this call; None if left out."""
    names = [argument.name for argument in func._schema.arguments]
    if name in kwargs or name not in names:
        return kwargs.get(name)
    place = names.index(name)
    return args[place] if place < len(args) else func._schema.arguments[place].default_value


def _written(func: Any, args: Any, kwargs: Any) -> dict[int, torch.Tensor]:
    """Results that are arguments written to, by their place."""
    owners = {
        alias: argument.name
        for argument in func._schema.arguments
        if argument.alias_info is not None
        for alias in argument.alias_info.before_set
    }
    found = {}
    for place, result in enumerate(func._schema.returns):
        if result.alias_info is not None:
            (alias,) = result.alias_info.before_set
            found[place] = _argument(func, owners[alias], args, kwargs)
    return found


def _is_random(func: Any, args: Any, kwargs: Any) -> bool:
    """Attention is called random for its dropout, which is mostly none."""
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return False
    names = {argument.name for argument in func._schema.arguments}
    return "dropout_p" not in names or bool(_argument(func, "dropout_p", args, kwargs))


def _masked(args: Any) -> bool:
    """By a mask, and not with one number, which would be a plain fill."""
    _, indices, values = args[:3]
    masks = [i for i in indices if i is not None and i.dtype in (torch.bool, torch.uint8)]
    return bool(masks) and values.numel() != 1
