"""The seam: carries out one `LayerPlan` per MoE layer and step.

Knows: the director (a mind), the transfer queue, the store, the expert MLPs, the clock. Does not
know: transformers, or why a plan is what it is.

    event -> decide -> start loads -> compute what is there, then each load as it lands
          -> offer speculation to the idle link -> sum in fixed order -> release

Look-up, load, compute and release of one event are one critical section; a forward that is parked
outside it holds nothing. All state of one forward is in its `Forward`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from understudy.core import (
    Costs,
    Counters,
    ExpertId,
    Forward,
    LayerEvent,
    LayerPlan,
    Phase,
    current_forward,
)
from understudy.experts.compute import Batch, ExpertMlp
from understudy.experts.interrupts import Deferred
from understudy.experts.lookahead import Lookahead
from understudy.experts.store import Store
from understudy.experts.transfer import TransferQueue
from understudy.policies.director import Director
from understudy.policies.residency import State

PATIENCE = 0.2  # seconds between looks at Ctrl-C while a read is slow

# Counters that the runtime fills; the rest is filled where plans are made.
_OF_THE_HANDS = ("substituted", "skipped", "stall_seconds", "expert_seconds", "steps", "tokens")


class Runtime:
    """Answers every experts call of one model. Re-entrant between events, locked within one."""

    def __init__(
        self,
        *,
        director: Director,
        store: Store,
        transfer: TransferQueue,
        lock: threading.Condition,
        mlps: Sequence[ExpertMlp],
        lookahead: Lookahead,
    ) -> None:
        self.director, self.store, self.transfer = director, store, transfer
        self.mlps, self.lookahead = mlps, lookahead
        self.recording: list[LayerEvent] | None = None
        self._lock = lock
        self._section = threading.Lock()
        self._clock = Counters()  # what only the hands can count: seconds, steps, tokens

    @property
    def counters(self) -> Counters:
        """A snapshot of everything counted so far."""
        with self._lock:
            total = self.director.counters.copy()
            total.prefetch_cancelled = self.transfer.cancelled
        for name in _OF_THE_HANDS:
            setattr(total, name, getattr(self._clock, name))
        return total

    # --------------------------------------------------------------------------- around a forward

    def begin(self, forward: Forward) -> None:
        """A forward pass of the whole model starts."""
        forward.started = time.perf_counter()

    def end(self, forward: Forward) -> None:
        """It is over; decode steps tell the switch how long they took."""
        seconds = time.perf_counter() - forward.started
        self._clock.steps += 1
        if forward.phase is Phase.DECODE:
            with self._lock:
                self.director.switch.record(seconds)

    # ---------------------------------------------------------------------------------- the seam

    def __call__(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        """hidden [T, H], ids [T, k], weights [T, k] -> [T, H]. ``layer`` counts MoE layers."""
        with torch.no_grad(), Deferred() as interrupts, self._section:
            self.transfer.require_open()
            forward = current_forward.get()
            rows = _real_rows(forward, len(hidden))
            if rows is None:
                return self._event(_Call(layer, hidden, ids, weights, forward), interrupts)
            out = torch.zeros_like(hidden)
            call = _Call(layer, hidden[rows], ids[rows], weights[rows], forward, rows)
            out[rows] = self._event(call, interrupts)
            return out

    def _event(self, call: _Call, interrupts: Deferred) -> torch.Tensor:
        if len(call.x) == 0:
            return torch.zeros_like(call.x)
        started, stalled = time.perf_counter(), self._clock.stall_seconds
        out = self._carry_out(call, self._describe(call), interrupts)
        stall = self._clock.stall_seconds - stalled
        self._clock.expert_seconds += time.perf_counter() - started - stall
        if call.layer == 0:
            self._clock.tokens += len(call.x)
        return out

    def _describe(self, call: _Call) -> LayerEvent:
        """The call as plain values, for the minds."""
        forward, meter = call.forward, self.transfer.meter
        phase = Phase.PREFILL if len(call.ids) > 1 else Phase.DECODE
        depth = self.director.predictor.lookahead if self.director.switch.on else 0
        event = LayerEvent(
            step=forward.step if forward else self._clock.steps,
            layer=call.layer,
            phase=forward.phase if forward else phase,
            ids=call.ids.tolist(),
            weights=call.weights.float().tolist(),
            requests=forward.requests if forward else (),
            lookahead=self.lookahead.ask(forward, call.layer, depth, call.rows) if depth else {},
            costs=Costs(meter.bandwidth, meter.idle, self.transfer.queued),
        )
        if self.recording is not None:
            self.recording.append(event)
        return event

    def _carry_out(self, call: _Call, event: LayerEvent, interrupts: Deferred) -> torch.Tensor:
        mlp = self.mlps[call.layer]
        with self._lock:
            self.transfer.speculate(())  # what was queued was a guess about now
            plan = self.director.decide(event)
            errand = _Errand(self.director, self.transfer, plan)
        try:
            batch = self._batch(call, event, plan)
            while errand.todo:
                with self._lock:
                    ready = errand.next_ready(interrupts)
                batch.compute_many([(e.expert, self.store.weights(e, s)) for e, s in ready], mlp)
                with self._lock:
                    for expert, _ in ready:
                        errand.computed(expert)
            return batch.sum()
        finally:
            with self._lock:
                errand.release()
            self._clock.stall_seconds += errand.stall_seconds

    def _batch(self, call: _Call, event: LayerEvent, plan: LayerPlan) -> Batch:
        """The tokens by expert; what a policy changed about them is counted here."""
        ids, weights = call.ids, call.weights
        if plan.event is not event:
            ids = torch.tensor(plan.event.ids, dtype=ids.dtype)
            weights = torch.tensor(plan.event.weights, dtype=weights.dtype)
            for asked, runs in zip(event.ids, plan.event.ids, strict=True):
                self._clock.substituted += sum(a != b for a, b in zip(asked, runs, strict=True))
        batch = Batch(call.x, ids, weights)
        for expert in plan.skipped:
            self._clock.skipped += batch.skip(expert.expert)
        return batch

    # ------------------------------------------------------------------------------------ the end

    def close(self) -> None:
        """Stop reading and give the memory back. Later calls of the model fail, and so does one
        that waits for an expert in another thread; one that computes finishes its event first."""
        self.transfer.close()
        with self._section:
            self.store.close()


@dataclass(slots=True)
class _Call:
    """One call of the seam, padding left out: x [T, H], ids [T, k], weights [T, k]."""

    layer: int
    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    forward: Forward | None
    rows: torch.Tensor | None = None


class _Errand:
    """One plan being carried out. Every method is called with the lock held.

    ``waiting``: loads whose victims cannot leave yet; ``todo``: experts not computed yet;
    ``pinned``: experts that must stay until they are.
    """

    def __init__(self, director: Director, transfer: TransferQueue, plan: LayerPlan) -> None:
        self.director, self.transfer = director, transfer
        self.todo, self.waiting = list(plan.order), list(plan.loads)
        self.prefetch = plan.prefetch
        self.pinned: set[ExpertId] = set()
        self.stall_seconds = 0.0
        for expert in (*plan.hits, *plan.late):
            self._pin(expert)
        for expert in plan.late:
            transfer.promote(expert)
        self._start_loads()

    def next_ready(self, interrupts: Deferred) -> list[tuple[ExpertId, int]]:
        """All experts that are there, in order, with their slots; sleeps until one is."""
        while True:
            interrupts.check()
            self._start_loads()
            ready = self._take_ready()
            if ready:
                return ready
            started = time.perf_counter()
            self.transfer.wait(PATIENCE)
            self.stall_seconds += time.perf_counter() - started

    def _take_ready(self) -> list[tuple[ExpertId, int]]:
        ready, later = [], []
        for expert in self.todo:
            slot = self.director.book.slot(expert)
            if expert in self.pinned:  # else its load has not started yet
                if slot is not None and slot.state is State.READY:
                    ready.append((expert, slot.index))
                    continue
                error = self.transfer.take_error(expert)
                if error is not None:
                    raise error
            later.append(expert)
        self.todo = later
        return ready

    def computed(self, expert: ExpertId) -> None:
        self._unpin(expert)

    def release(self) -> None:
        """However the event ended, it holds nothing any more."""
        for expert in list(self.pinned):
            self._unpin(expert)

    def _start_loads(self) -> None:
        """Issue the loads whose victims can leave; speculation follows the last of them."""
        later = []
        for load in self.waiting:
            if self.director.may_start(load):
                slot = self.director.commit(load)
                self._pin(load.expert)
                self.transfer.demand(load.expert, slot)
            else:
                later.append(load)
        self.waiting = later
        if not later and self.prefetch:
            self.transfer.speculate(self.prefetch)
            self.prefetch = ()

    def _pin(self, expert: ExpertId) -> None:
        self.director.book.pin(expert)
        self.pinned.add(expert)

    def _unpin(self, expert: ExpertId) -> None:
        self.pinned.discard(expert)
        slot = self.director.book.slot(expert)
        if slot is not None and slot.pins:  # a failed load has already given its slot back
            self.director.book.unpin(expert)


def _real_rows(forward: Forward | None, tokens: int) -> Any:
    """Which rows are tokens and not padding; ``None``: all of them."""
    if forward is None or forward.rows is None or len(forward.rows) != tokens:
        return None
    return forward.rows
