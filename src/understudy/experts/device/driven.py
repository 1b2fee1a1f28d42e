"""The seam of a decode step in which the host decides nothing: it launches, the device looks up,
chooses victims and fetches.

Knows: which kernel runs on which stream after which. Does not know: how they choose (`decide`), how
experts are computed, what a router is. Nothing here reads a value of the device, so one recording
of a step is good for every token.

    compute   .. router l | decide l, gather l | experts l, attention, router l+1 | decide l+1 ..
                 \\                    \\                                            /
    side          foresee l+1 .......... guess l+1, gather, commit ................/

The side stream asks the next layer's router while demand loads fly, and moves what it foresees once
they have landed: the link is idle then. The next layer joins it before looking anything up. No
lookup can see an expert whose bytes are still coming, twice over: it waits, and the expert enters
the table last. Run a step before recording one: kernels are compiled at their first launch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from understudy.core import BudgetTooSmall, Counters, ExpertId
from understudy.experts.device import Device, Event
from understudy.experts.device.ledger import (
    MOST_PAIRS,
    CopyList,
    Ledger,
    fewest_slots,
    power_of_two,
)
from understudy.experts.device.reach import LINE, Reach
from understudy.experts.device.slots import checking


class Experts(Protocol):
    """The expert MLPs of one layer, over the slots of the arena."""

    def few(self, x: torch.Tensor, slots: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """[T, H] of x [T, H], slots int32 [T, k] (-1: nobody), weights [T, k]."""


class Driven:
    """See the head of this file. Called once per MoE layer and forward, in order of the layers."""

    def __init__(
        self,
        device: Device,
        experts: Sequence[Experts],
        arena: torch.Tensor,
        slot_bytes: int,
        addresses: torch.Tensor,
        nbytes: int,
        *,
        k: int,
        tokens: int = 1,
        foresee: Callable[[int], torch.Tensor | None] | None = None,
        most: int = 0,
        reach: Reach | None = None,
    ) -> None:
        """
        ``arena``: uint8 [slots * slot_bytes] on the device. ``addresses``: int64 [L, E] on the
        host, of slabs of ``nbytes`` in pinned memory. ``k``: ranks; ``tokens``: the most in one
        forward.

        ``foresee(layer)`` launches what guesses the experts of ``layer + 1``, on the stream in use,
        from what is known when ``layer`` is called, and returns their ids [T, k] in order of
        weight, or ``None``. It reads tensors of the compute stream from another one: whoever gives
        it keeps them until the next layer is called. ``most``: experts that one guess may move.

        Raises `BudgetTooSmall` where a layer's slots could not hold all that one event may need.
        """
        _aligned(arena, slot_bytes, addresses, nbytes)
        if tokens * k > MOST_PAIRS:
            raise ValueError(f"{tokens} tokens of {k} experts: at most {MOST_PAIRS} pairs an event")
        slots, (layers, in_layer) = len(arena) // slot_bytes, addresses.shape
        _require_slots(slots, fewest_slots(layers, in_layer, tokens * k), slot_bytes)
        from understudy.experts.device import decide

        self._kernels, self.device, self._experts = decide, device, experts
        self.ledger = Ledger(device, addresses, slots)
        self.tokens, self.nbytes = tokens, nbytes
        self._arena, self._slot_bytes = arena.view(torch.int32), slot_bytes
        self._foresee = foresee if most else None
        self._most = min(most, MOST_PAIRS)
        self._reach = reach or Reach()
        self._slots = device.allocate(tokens * k * 4).view(torch.int32)
        # Urgent: its few programs mostly wait for the link, and should not wait for experts too.
        self._side = device.stream(urgent=True)
        self._coming: Event | None = None  # the end of the speculation that nobody has joined yet
        self._foreseen: tuple[torch.Tensor, ...] = ()  # kept alive until then
        self._check = checking()

    # ------------------------------------------------------------------------- the host's handover

    def adopt(self, residents: Mapping[ExpertId, int], free: Sequence[int]) -> list[ExpertId]:
        """Take over the slots from the host: who is where, least recently used first, and the free
        ones. Returns whom the layers' quotas cost their slot. No load may be under way."""
        self._settle()
        return self.ledger.adopt(residents, free)

    def give_back(self) -> list[tuple[ExpertId, int]]:
        """Who is in which slot now, least recently used first; all other slots are free."""
        self._settle()
        return self.ledger.residents()

    def counters(self) -> Counters:
        """Counted since the start. The host waits, so ask every many tokens. With UNDERSTUDY_CHECK
        raises `AssertionError` if a slot ever did not hold the expert asked for."""
        self._settle()
        counters, violations = self.ledger.count()
        if violations:
            raise AssertionError(f"{violations} times a slot did not hold the expert asked for")
        return counters

    def _settle(self) -> None:
        """What is asked of the compute stream next comes after all speculation, also that of a
        forward that was given up, or of a recording that failed."""
        self._coming, self._foreseen = None, ()
        self.device.compute.wait(self._side.record())

    # ---------------------------------------------------------------------------------- the seam

    def __call__(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden [T, H], ids [T, k] (-1: nobody), weights [T, k] -> [T, H]."""
        if len(ids) > self.tokens:
            raise ValueError(f"{len(ids)} tokens at once, planned for {self.tokens}")
        compute = self.device.compute
        if self._coming is not None:
            compute.wait(self._coming)
            self._coming, self._foreseen = None, ()
        foresees = self._foresee is not None and layer + 1 < self.ledger.layers
        routed = compute.record() if foresees else None
        ids = ids.contiguous()
        slots = self._slots[: ids.numel()].view(ids.shape)
        self._decide(layer, ids, slots)
        self._gather(self.ledger.demand)
        if self._check:
            self._verify(layer, ids, slots)
        if routed is not None:
            self._speculate(layer, routed, compute.record())
            self._foreseen += (hidden,)
        return self._experts[layer].few(hidden, slots, weights)

    def _speculate(self, layer: int, routed: Event, landed: Event) -> None:
        """What layer + 1 will need, on the side stream. It is joined even if nothing is foreseen:
        a recording ends with all its branches joined."""
        assert self._foresee is not None
        with self._side:
            self._side.wait(routed)
            ids = self._foresee(layer)
            self._side.wait(landed)
            if ids is not None:
                ids = ids.contiguous()
                self._foreseen = (ids,)
                self._guess(layer + 1, ids)
                self._gather(self.ledger.guessed)
                self._commit()
        self._coming = self._side.record()

    # ------------------------------------------------------------------------------- the launches

    def _decide(self, layer: int, ids: torch.Tensor, slots: torch.Tensor) -> None:
        book, to = self.ledger, self.ledger.demand
        self._small(
            self._kernels.decide,
            *(ids, slots, layer, ids.numel()),
            *(book.table, book.owner, book.stamp, book.fresh, book.pool, book.size, book.clock),
            *(book.addresses, to.sources, to.targets, to.length, book.counters, self.nbytes),
            EXPERTS=book.experts,
            POOL=book.capacity,
            PAIRS=power_of_two(ids.numel()),
        )

    def _guess(self, layer: int, ids: torch.Tensor) -> None:
        book, to = self.ledger, self.ledger.guessed
        tokens, k = ids.shape
        self._small(
            self._kernels.guess,
            *(ids, layer, tokens, k, self._most),
            *(book.table, book.owner, book.stamp, book.guard, book.fresh),
            *(book.pool, book.size, book.clock, book.addresses),
            *(to.sources, to.targets, to.names, to.length, book.counters, self.nbytes),
            EXPERTS=book.experts,
            POOL=book.capacity,
            PAIRS=power_of_two(ids.numel()),
        )

    def _commit(self) -> None:
        book, came = self.ledger, self.ledger.guessed
        self._small(
            self._kernels.commit,
            *(came.targets, came.names, came.length, book.table, book.owner, book.fresh),
            LIST=MOST_PAIRS,
        )

    def _verify(self, layer: int, ids: torch.Tensor, slots: torch.Tensor) -> None:
        self._small(
            self._kernels.verify,
            *(ids, slots, layer, ids.numel(), self.ledger.owner, self.ledger.counters),
            EXPERTS=self.ledger.experts,
            PAIRS=power_of_two(ids.numel()),
        )

    def _gather(self, moves: CopyList) -> None:
        self.device.launch(
            self._kernels.gather,
            (self._reach.programs,),
            *(moves.sources, moves.targets, moves.length, self._arena),
            *(self.nbytes // LINE, self._slot_bytes // LINE),
            LINES=self._reach.lines,
            num_warps=self._reach.warps,
        )

    def _small(self, kernel: object, *args: object, **constants: int) -> None:
        """One program of one warp; `decide` says why not more."""
        self.device.launch(kernel, (1,), *args, **constants, num_warps=1)


def _aligned(arena: torch.Tensor, slot_bytes: int, addresses: torch.Tensor, nbytes: int) -> None:
    if nbytes % LINE or slot_bytes % LINE or (addresses % LINE).any() or nbytes > slot_bytes:
        raise ValueError(f"slabs are moved in lines of {LINE} bytes, into slots that hold them")


def _require_slots(slots: int, fewest: int, slot_bytes: int) -> None:
    if slots < fewest:
        least = fewest * slot_bytes
        raise BudgetTooSmall(
            f"device-driven decode needs {fewest} expert slots on the device and has {slots}: "
            f"raise --device-memory by {-(-(least - slots * slot_bytes) >> 20)} MiB, "
            "or use --decode host",
            least,
        )
