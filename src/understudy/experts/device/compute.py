"""Experts computed by the device, straight from its slots.

Knows: slots, the two ways to compute from them. Does not know: which expert is needed or why, how
it came into its slot.

Two ways. `Swiglu`, our kernels, computes all experts that are ready in one or two launches. Where
they do not apply (another activation, biases, a weight format of its own) or were not asked for,
torch computes one expert per call, by the same `ExpertMlp` as on the CPU. Which one is used depends
on the model and the number of tokens, never on what is resident: bits must not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from understudy.core import NOBODY, ExpertId
from understudy.experts.compute import Batch, ExpertMlp, Work, bucket
from understudy.experts.device import Device
from understudy.experts.device.host import HostTier
from understudy.experts.device.slots import DeviceSlots
from understudy.experts.device.swiglu import FEW


class Kernel(Protocol):
    """What `swiglu.Swiglu` answers; ``slots`` [T, k] int32, -1: nobody."""

    def few(self, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor: ...
    def pairs(self, x: torch.Tensor, slots: torch.Tensor, into: torch.Tensor) -> object: ...
    def many(self, x: torch.Tensor, slots: torch.Tensor, into: torch.Tensor) -> object: ...
    def sum(self, into: torch.Tensor, weights: torch.Tensor) -> torch.Tensor: ...


class DeviceCompute:
    """``mlps`` and ``kernels``: one per MoE layer; no kernel: torch computes this layer."""

    far = True

    def __init__(
        self, device: Device, slots: DeviceSlots, host: HostTier, mlps: Sequence[ExpertMlp],
        kernels: Sequence[Kernel | None], host_mlps: Sequence[ExpertMlp],
        fill: Callable[[ExpertId], None],
    ) -> None:  # fmt: skip
        """``host_mlps``: what computes in host memory, where a policy asks for that; ``fill``
        brings an expert there."""
        self.device, self.slots, self.host = device, slots, host
        self.mlps, self.kernels, self.host_mlps, self.fill = mlps, kernels, host_mlps, fill

    def read(self, *tensors: torch.Tensor) -> list[Any]:
        return self.device.fetch(*tensors)

    def begin(
        self, layer: int, x: torch.Tensor, ids: Sequence[Sequence[int]], weights: torch.Tensor,
        *, keep: bool = False,
    ) -> Work:  # fmt: skip
        kernel = self.kernels[layer]
        if kernel is None:
            return TorchWork(self, layer, x, ids, weights)
        return KernelWork(self, kernel, layer, x, ids, weights, keep)

    def close(self) -> None:
        """Nobody asks any more; what was asked for ends first, and may read either memory."""
        self.device.compute.record().synchronize()
        self.slots.close()
        self.host.close()


class _InPlace:
    """Misses computed by the processor in host memory, while the device does the rest: only rows
    of activations cross the link."""

    x: torch.Tensor
    ids: Sequence[Sequence[int]]
    _place: DeviceCompute
    _layer: int

    def _in_place(self, experts: Sequence[ExpertId]) -> tuple[torch.Tensor, torch.Tensor]:
        """(token, rank) pairs, and what these experts make of them [pairs, H], on the device."""
        place, slab = self._place, self._place.slots.slabs[self._layer]
        batch = Batch(place.device.bring(self.x), self.ids, torch.empty(0))
        for expert in experts:
            if expert not in place.host:
                place.fill(expert)
            batch.compute(
                expert.expert, place.host_mlps[self._layer], slab.views(place.host.take(expert))
            )
        wanted = {e.expert for e in experts}
        pairs = [i for i, e in enumerate(e for row in self.ids for e in row) if e in wanted]
        return (
            place.device.send(torch.tensor(pairs)),
            place.device.send(batch.out[pairs]),
        )


class KernelWork(_InPlace):
    """One event by our kernels. All experts ready at once (the usual case): one fused call."""

    def __init__(
        self, place: DeviceCompute, kernel: Kernel, layer: int, x: torch.Tensor,
        ids: Sequence[Sequence[int]], weights: torch.Tensor, keep: bool,
    ) -> None:  # fmt: skip
        self.x, self.ids, self.weights = x.contiguous(), ids, weights
        self.tokens, self.k = len(ids), len(ids[0])
        self._place, self._layer, self._kernel, self._keep = place, layer, kernel, keep
        self._todo = {e for row in ids for e in row}
        self._sent: torch.Tensor | None = None  # the ids, on the device
        self._last = 0  # the largest of them
        self._out: torch.Tensor | None = None
        self._sum: torch.Tensor | None = None

    def __contains__(self, expert: int) -> bool:
        return expert in self._todo

    @property
    def out(self) -> torch.Tensor:
        """[T, k, H], zero where nobody has computed."""
        if self._out is None:
            self._out = self.x.new_zeros(self.tokens, self.k, self.x.shape[1])
        return self._out

    def run(self, ready: Sequence[tuple[ExpertId, int]]) -> None:
        where = {expert.expert: slot for expert, slot in ready}
        first = self._out is None
        self._todo -= where.keys()
        with self._place.slots.reading(ready):
            slots = self._slots(where)
            if first and not self._todo and not self._keep and self.tokens <= FEW:
                self._sum = self._kernel.few(self.x, slots, self.weights)
            elif self.tokens <= FEW:
                self._kernel.pairs(self.x, slots, self.out)
            else:
                self._kernel.many(self.x, slots, self.out)

    def run_in_place(self, experts: Sequence[ExpertId]) -> None:
        self._todo -= {e.expert for e in experts}
        pairs, rows = self._in_place(experts)
        self.out.view(-1, self.x.shape[1])[pairs] = rows

    def _slots(self, where: dict[int, int]) -> torch.Tensor:
        send = self._place.device.send
        if self.tokens <= FEW:
            rows = [[where.get(e, NOBODY) for e in row] for row in self.ids]
            return send(torch.tensor(rows, dtype=torch.int32))
        if self._sent is None:  # a prompt's experts come in groups: its ids are sent once
            self._sent = send(torch.tensor(self.ids))
            self._last = max(map(max, self.ids))
        table = torch.full((self._last + 2,), NOBODY, dtype=torch.int32)  # the last one: NOBODY's
        table[list(where)] = torch.tensor(list(where.values()), dtype=torch.int32)
        return send(table)[self._sent]

    def skip(self, expert: int) -> None:
        self._todo.discard(expert)

    def sum(self) -> torch.Tensor:
        if self._sum is not None:
            return self._sum
        return self._kernel.sum(self.out, self.weights)


class TorchWork(_InPlace):
    """One event by torch, one expert per call."""

    def __init__(
        self, place: DeviceCompute, layer: int, x: torch.Tensor, ids: Sequence[Sequence[int]],
        weights: torch.Tensor,
    ) -> None:  # fmt: skip
        self.x, self.ids, self.weights = x.contiguous(), ids, weights
        self.tokens, self.k = len(ids), len(ids[0])
        self.out = x.new_zeros(self.tokens * self.k, x.shape[1])
        self._place, self._layer = place, layer
        self._pairs: dict[int, list[int]] = {}  # expert -> its (token, rank) pairs
        for pair, expert in enumerate(e for row in ids for e in row):
            self._pairs.setdefault(expert, []).append(pair)

    def __contains__(self, expert: int) -> bool:
        return expert in self._pairs

    def run(self, ready: Sequence[tuple[ExpertId, int]]) -> None:
        slots, mlp = self._place.slots, self._place.mlps[self._layer]
        with slots.reading(ready):
            for expert, slot in ready:
                pairs = self._place.device.send(torch.tensor(self._pairs[expert.expert]))
                rows = self.x.new_zeros(bucket(len(pairs)), self.x.shape[1])
                torch.index_select(self.x, 0, pairs // self.k, out=rows[: len(pairs)])
                self.out[pairs] = mlp(rows, slots.weights(expert, slot))[: len(pairs)]

    def run_in_place(self, experts: Sequence[ExpertId]) -> None:
        pairs, rows = self._in_place(experts)
        self.out[pairs] = rows

    def skip(self, expert: int) -> None:
        """Its rows stay zero."""

    def sum(self) -> torch.Tensor:
        wide = self.out.view(self.tokens, self.k, -1).float()
        total = wide[:, 0] * self.weights[:, :1].float()
        for rank in range(1, self.k):
            total = torch.addcmul(total, wide[:, rank], self.weights[:, rank : rank + 1].float())
        return total.to(self.x.dtype)
