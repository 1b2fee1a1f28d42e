"""Wires a model whose experts are computed on an accelerator.

Knows: what `assembly` knows, and the parts of `experts.device`. Does not know: prompts, HTTP, how
budgets are divided (`plan`).

    disk -> host slabs (pinned; `--memory`) -> device slots (`--device-memory`)

Dense weights, KV cache, working memory and slots share the budget of the device. The host's pays
for the slabs, and for a staging slot per reading thread.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from understudy import model as guest
from understudy import plan as planning
from understudy.anatomy import Anatomy, Options
from understudy.assembly import Built, Minds, host_mlps, make_director
from understudy.captured import NotCaptured, Step
from understudy.core import BudgetTooSmall, Costs, ExpertId, UnderstudyError, current_forward
from understudy.experts.compute import ExpertMlp
from understudy.experts.device import Device, DeviceFull, ends, tuning
from understudy.experts.device.compute import DeviceCompute, Kernel
from understudy.experts.device.driven import Driven
from understudy.experts.device.host import HostTier
from understudy.experts.device.pinned import Slabs
from understudy.experts.device.queue import SPECULATION, DeviceQueue
from understudy.experts.device.slab import Slab
from understudy.experts.device.slots import DeviceSlots, slab_bytes
from understudy.experts.device.swiglu import FEW, Swiglu, why_not
from understudy.experts.kernels import Crowd
from understudy.experts.lookahead import Lookahead
from understudy.experts.runtime import Runtime
from understudy.experts.store import PAGE, Store, slot_bytes
from understudy.policies.director import Director
from understudy.turns import DEVICE, HOST, Rows, Turns

KERNELS = ("auto", "triton", "torch")
MOST_TRIED = 256  # experts that the processor is timed on: of small ones, no more fill a cache


def _cuda(asked: str) -> Device:
    from understudy.experts.device.cuda import open_cuda

    return open_cuda(asked)


OPENERS: dict[str, Callable[[str], Device]] = {"cuda": _cuda}


def open_device(asked: str) -> Device:
    """``cuda`` or ``cuda:1``. Raises `UnderstudyError` where there is none of that name."""
    opener = OPENERS.get(asked.partition(":")[0])
    if opener is None:
        raise UnderstudyError(f"unknown --device {asked!r}; use cpu, {', '.join(OPENERS)}")
    return opener(asked)


class HostOnly(Exception):
    """Decode steps are the host's to drive. The text says why."""


class OnDevice:
    """Experts computed by an accelerator, in slots that are filled from host memory."""

    memory_option = "--device-memory"

    def __init__(self, a: Anatomy, o: Options) -> None:
        if o.kernel not in KERNELS:
            raise UnderstudyError(f"--kernel {o.kernel} is of the CPU; use {', '.join(KERNELS)}")
        self.a, self.o = a, o
        self.device = open_device(o.device)

    @cached_property
    def slabs(self) -> list[Slab]:
        """One per MoE layer."""
        return [
            Slab.of(self.a.layout_of(layer), transposed=module.transposed)
            for layer, module in enumerate(self.a.modules)
        ]

    def budget(self) -> int:
        """Bytes of the device that dense weights, slots, KV cache and working memory share."""
        free = self.device.free_bytes
        return planning.parse_memory(self.o.device_memory, self.a.checkpoint.nbytes, free)

    @property
    def slot_bytes(self) -> int:
        return slab_bytes(self.slabs)

    def expect(self, plan: planning.Plan) -> planning.Plan:
        """Nobody has measured the link yet: no expectation."""
        return plan

    def build(
        self, plan: planning.Plan, model: Any, minds: Minds, say: Callable[[str], None]
    ) -> Built:
        a, o, device, lock = self.a, self.o, self.device, threading.RLock()
        nn.Module.to(model, device.torch_device)
        if minds.foresight is not None:
            minds.foresight.to(device.torch_device)
        slots, plan, notes = self._slots(plan)
        mlps = [ExpertMlp(module, a.checkpoint.format) for module in guest.guests(model)]
        kernels = self._kernels(mlps, slots, model.dtype, notes)
        host = self._host(say, notes)  # last of what may be refused: it takes minutes
        director = make_director(a, o, plan, minds, lambda e: self.slabs[e.layer].nbytes)
        queue = DeviceQueue(
            director.book,
            device=device,
            slots=slots,
            host=host,
            lock=lock,
            place=director.place,
            forget=director.forget,
        )
        beside, costs = self._processor(director, model)
        runtime = Runtime(
            director=director,
            compute=DeviceCompute(device, slots, host, mlps, kernels, beside, queue.read),
            transfer=queue,
            lock=lock,
            lookahead=Lookahead(guest.routers(model, a.modules), _products(), minds.foresight),
            costs=costs,
        )
        facts = {
            "device": device.name,
            "kernel": "triton" if all(kernels) else "torch",
            "frame": "eager",
            "decode": HOST,
            "host_experts": f"{min(host.memory.slots, len(a.layouts))} of {len(a.layouts)}",
        }
        return Built(plan, runtime, host.store, notes, facts)

    # ------------------------------------------------------------------------- the decode step

    def finish(self, model: Any, built: Built, minds: Minds) -> None:
        """The model is attached: record its decode step, where that is possible. A rehearsal may
        leave anything in the slots, so they are filled after it."""
        self._record(model, built, minds)
        runtime = built.runtime
        if runtime.director.ample:
            assert isinstance(runtime.transfer, DeviceQueue)
            _bring_all(runtime.director, runtime.transfer, self.a.layouts)

    def _record(self, model: Any, built: Built, minds: Minds) -> None:
        try:
            step = self._step(model, built, minds)
            model._captured, built.facts["frame"] = step, "recorded"
            if self.o.decode != HOST:
                model._captured = built.others = self._turns(model, built, step)
        except (HostOnly, NotCaptured, BudgetTooSmall) as why:
            if self.o.decode == DEVICE:
                built.runtime.close()
                raise UnderstudyError(
                    f"--decode device is not possible: {why}; use --decode host"
                ) from why
            if self.o.decode == "auto":
                built.facts["decode"] = f"{HOST}: {why}"

    def _step(self, model: Any, built: Built, minds: Minds) -> Step:
        """The host's. Raises `HostOnly` where steps stay eager."""
        if self.o.frame == "eager" or minds.needs_residual:
            raise HostOnly("the frame is eager")
        try:
            return Step.record(model, self.device, built.runtime, built.plan.context)
        except NotCaptured as e:
            built.notes.append(f"note: decode steps are not recorded, and slower: {e}")
            raise HostOnly("decode steps are not recorded") from e

    def _why_not_driven(self, compute: DeviceCompute) -> str | None:
        """Why the device cannot decide by itself; ``None`` where it can."""
        o, memory, plain = self.o, compute.host.memory, Options()
        if not all(compute.kernels):
            return "it needs the triton kernels"
        if not compute.host.holds_all or memory.pinned_slots < memory.slots:
            return "it needs all experts in pinned host memory"
        if len({slab.nbytes for slab in self.slabs}) > 1:
            return "the experts of the layers differ in size"
        if len({module.num_experts for module in self.a.modules}) > 1:
            return "the layers differ in the number of their experts"
        if (o.route, o.resolver) != (plain.route, plain.resolver):
            return "routes and resolvers are the host's"
        if o.decode == "auto" and o.evictor != plain.evictor:
            return "who leaves was asked for, and the device has a rule of its own"
        return None

    def _turns(self, model: Any, built: Built, by_host: Step) -> Turns:
        """Raises `HostOnly`, `BudgetTooSmall` or `NotCaptured` where the device cannot decide."""
        compute, runtime = built.runtime.compute, built.runtime
        assert isinstance(compute, DeviceCompute)
        why = self._why_not_driven(compute)
        if why is not None:
            raise HostOnly(why)
        modules, nbytes = self.a.modules, self.slabs[0].nbytes
        addresses = [
            [compute.host.address(ExpertId(layer, e)) for e in range(module.num_experts)]
            for layer, module in enumerate(modules)
        ]
        ahead = runtime.director.predictor.lookahead > 0
        driven = Driven(
            self.device,
            [kernel for kernel in compute.kernels if kernel is not None],
            compute.slots.arena,
            compute.slots.slot_bytes,
            torch.tensor(addresses),
            nbytes,
            k=self._top_k,
            foresee=_Foreseen(runtime.lookahead) if ahead else None,
            most=max(1, SPECULATION // nbytes),
        )
        if self.o.evictor != Options().evictor:
            built.notes.append(
                "note: while the device decides, each layer's least recently used expert leaves, "
                f"whatever --evictor {self.o.evictor} would say"
            )
        driven.adopt({}, range(built.plan.slots))
        seam, context = Rows(driven), built.plan.context
        try:
            by_device = Step.record(model, self.device, seam, context, cache=by_host.cache)
        finally:
            driven.give_back()  # waits: a rehearsal that failed may still be writing to the slots
        return Turns(runtime, compute.slots, driven, by_host, by_device, self.o.decode)

    # ------------------------------------------------------------------------------- the memories

    def _slots(self, plan: planning.Plan) -> tuple[DeviceSlots, planning.Plan, list[str]]:
        """The slots that were planned, or as many as the device has room for beside what comes
        later: others use it too, and what is said to be free may lie in pieces."""
        later = self.device.allocate(plan.kv + plan.activations)
        planned, note = plan.slots, []
        while True:
            try:
                slots = DeviceSlots(self.device, self.slabs, plan.slots)
            except DeviceFull:
                if plan.slots <= planning.MINIMUM_SLOTS:
                    raise
                plan = plan.with_slots(max(planning.MINIMUM_SLOTS, plan.slots * 7 // 8))
            else:
                break
        del later
        if plan.slots < planned:
            note.append(f"note: the device is fuller than planned: {plan.slots} experts resident")
        return slots, plan, note

    def _host(self, say: Callable[[str], None], notes: list[str]) -> HostTier:
        """Slabs for all experts, or for as many as `--memory` pays for."""
        a, o, each = self.a, self.o, -(-self.slot_bytes // PAGE) * PAGE
        staging = o.io_threads * slot_bytes(a.layouts)
        total = planning.parse_memory(o.memory, a.checkpoint.nbytes)
        count = min(len(a.layouts), (total - staging) // each)
        smallest = staging + planning.MINIMUM_SLOTS * each
        if count < min(planning.MINIMUM_SLOTS, len(a.layouts)):
            raise BudgetTooSmall(
                f"memory {planning.shown_size(total)} is too small for the experts' host copies: "
                f"use --memory {planning.typed_size(smallest)} or more",
                smallest,
            )
        store = Store(a.checkpoint.files, a.layouts, o.io_threads, direct=o.direct_io)
        memory = Slabs(self.device, count, each)
        host = HostTier(store, self.slabs, memory, o.io_threads)
        if memory.note is not None:
            notes.append(f"note: {memory.note}")
        if host.holds_all:
            self._fill(host, say)
        else:
            notes.append(
                f"note: host memory holds {count} of {len(a.layouts)} experts; the rest is read "
                "from disk when it is needed; a larger --memory avoids that"
            )
        return host

    def _fill(self, host: HostTier, say: Callable[[str], None]) -> None:
        experts = sorted(self.a.layouts, key=lambda e: self.a.layouts[e].reads[0])
        size = planning.shown_size(sum(self.a.layouts[e].nbytes for e in experts))
        say(f"reading {size} of experts into host memory")
        try:
            host.fill(experts, lambda count: None)
        except BaseException:
            host.close()
            raise

    # -------------------------------------------------------------------------------- the computing

    def _kernels(
        self, mlps: Sequence[ExpertMlp], slots: DeviceSlots, dtype: torch.dtype, notes: list[str]
    ) -> list[Kernel | None]:
        """Our kernel for each layer, or for none where it does not apply to all."""
        why = self._why_not_triton(mlps, dtype)
        if why is None:
            return [self._kernel(layer, slots, dtype) for layer in range(len(self.slabs))]
        if self.o.kernel == "triton":
            raise UnderstudyError(f"--kernel triton is not possible: {why}; use --kernel torch")
        if self.o.kernel == "auto":
            notes.append(f"note: torch computes, one expert at a time: {why}")
        return [None] * len(mlps)

    def _kernel(self, layer: int, slots: DeviceSlots, dtype: torch.dtype) -> Swiglu:
        """With the tiles that were measured for experts like these; an interpreter that stands in
        for a device would measure itself."""
        slab, k = self.slabs[layer], self._top_k
        where = self.device, slab, self.a.checkpoint.format, dtype, slots.arena, slots.slot_bytes
        compiled = self.device.torch_device.type != "cpu"
        tiles = tuning.choose(tuning.Trial(*where, k)).tiles if compiled else None
        experts = self.a.modules[layer].num_experts
        return Swiglu(*where, FEW * k, tiles=tiles, distinct=experts)

    @property
    def _top_k(self) -> int:
        return max(1, guest.experts_per_token(self.a.checkpoint.config))

    def _why_not_triton(self, mlps: Sequence[ExpertMlp], dtype: torch.dtype) -> str | None:
        if self.o.kernel == "torch":
            return "torch was asked for"
        if not all(mlp.swiglu for mlp in mlps):
            return "the experts are not SwiGLU"
        reasons = (why_not(slab, self.a.checkpoint.format, dtype) for slab in self.slabs)
        return next((why for why in reasons if why is not None), None)

    def _processor(self, director: Director, model: Any) -> tuple[list[ExpertMlp], Costs | None]:
        """What computes misses in host memory, and how fast both ends are; nothing where the
        resolver fetches them all."""
        if not director.resolver.needs_device:
            return [], None
        beside, _ = host_mlps(self.a, "auto", model)
        if any(mlp.norm is not None for mlp in beside):
            raise UnderstudyError(
                f"--resolver {self.o.resolver}: the experts of {self.a.name} end in a norm, which "
                "is on the device; use --resolver fetch"
            )
        most = 1 + ends.CROWD_BYTES // self.a.expert_bytes
        crowd = Crowd(
            beside[0], self.a.layout_of(0), model.dtype,
            cold_bytes=ends.CROWD_BYTES, most=min(most, MOST_TRIED),
        )  # fmt: skip
        found = ends.both(self.device, crowd)
        return beside, Costs(
            link_bandwidth=found.link_beside,
            host_bandwidth=found.host_beside,
            host_further=found.host_further,
        )


def _bring_all(director: Director, queue: DeviceQueue, experts: Iterable[ExpertId]) -> None:
    """There is a slot for everybody: nobody needs to miss first."""
    with queue.lock:
        here = [expert for expert in experts if expert in queue.host]
        queue.demand_all([(expert, director.welcome(expert)) for expert in here])
        queue.settle()


class _Foreseen:
    """What the next layer's router says, for a device that decides alone."""

    def __init__(self, lookahead: Lookahead) -> None:
        self._lookahead = lookahead
        self._asked: Any = None  # another stream reads it until the next layer is called

    def __call__(self, layer: int) -> torch.Tensor | None:
        forward = current_forward.get()
        self._asked = forward and forward.router_args.get(layer)
        return self._lookahead.next_ids(forward, layer)


def _products() -> Callable[[torch.Tensor, list[torch.Tensor]], torch.Tensor]:
    """x [1, H], router matrices -> [1, all lines], in one product. Routers do not change, so their
    common matrix is made once for each set of them that is asked together."""
    joined: dict[tuple[int, ...], torch.Tensor] = {}

    def products(x: torch.Tensor, matrices: list[torch.Tensor]) -> torch.Tensor:
        if len(matrices) == 1:
            return functional.linear(x, matrices[0])
        key = tuple(m.data_ptr() for m in matrices)
        if key not in joined:
            joined[key] = torch.cat(matrices)
        return functional.linear(x, joined[key])

    return products
