"""The seam: carries out one `LayerPlan` per MoE layer and step.

Knows: the director (a mind), the transfer queue, whoever computes, the clock. Does not know:
transformers, why a plan is what it is, or on which side of the link experts are computed.

    event -> decide -> start loads -> compute what is there -> look ahead while loads fly, offer
          speculation to the idle link -> compute each load as it lands -> sum in fixed order
          -> release

Look-up, load, compute and release of one event are one critical section; a forward that is parked
outside it holds nothing. All state of one forward is in its `Forward`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from understudy.core import (
    NOBODY,
    Costs,
    Counters,
    ExpertId,
    Forward,
    Guess,
    LayerEvent,
    LayerPlan,
    Phase,
    current_forward,
)
from understudy.experts.compute import Compute, Work
from understudy.experts.interrupts import Deferred
from understudy.experts.lookahead import Lookahead
from understudy.experts.transfer import Transfer
from understudy.policies.director import Director
from understudy.policies.residency import State

PATIENCE = 0.2  # seconds between looks at Ctrl-C while a read is slow

_NOTHING = nullcontext()

# Counters that the runtime fills; the rest is filled where plans are made.
_OF_THE_HANDS = (
    "substituted", "skipped", "substituted_mass", "skipped_mass",
    "stall_seconds", "expert_seconds", "steps", "tokens",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Seen:
    """One event, for whoever learns from it: ``event`` as it was carried out, ``forward`` with the
    router's arguments, x [T, H] and out [T, k, H], every expert's own output, unweighted."""

    event: LayerEvent
    forward: Forward | None
    x: torch.Tensor
    out: torch.Tensor


class Runtime:
    """Answers every experts call of one model. Re-entrant between events, locked within one."""

    def __init__(
        self,
        *,
        director: Director,
        compute: Compute,
        transfer: Transfer,
        lock: threading.RLock,
        lookahead: Lookahead,
        costs: Costs | None = None,
    ) -> None:
        """``costs``: what was measured once for all; what changes is measured again and again."""
        self.director, self.compute, self.transfer = director, compute, transfer
        self.lookahead = lookahead
        self.recording: list[LayerEvent] | None = None
        self.watch: Callable[[Seen], None] | None = None
        self.tap: Callable[[LayerEvent], None] | None = None  # told of events, with the lock held
        self.wants_scores = director.route.wants_scores
        self._lock = lock
        self.section = threading.Lock()  # one event at a time
        self.claim: Callable[[], None] | None = None  # gets the slots back from whoever has them
        self._costs = self._known = costs or Costs()
        self._clock = Counters()  # what only the hands can count: seconds, steps, tokens
        self._settled = False  # every expert is resident, and nobody ever leaves

    @property
    def counters(self) -> Counters:
        """A snapshot of everything counted so far."""
        with self._lock:
            total = self.director.counters.copy()
            total.prefetch_cancelled = self.transfer.cancelled
            stalled = self.transfer.stalled
        for name in _OF_THE_HANDS:
            setattr(total, name, getattr(self._clock, name))
        total.stall_seconds += stalled
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
        # Where every expert is here for good, an interrupt can lose nothing, and need not wait.
        deferred: AbstractContextManager[Deferred | None] = (
            _NOTHING if self._settled else Deferred()
        )
        quiet = torch.no_grad() if torch.is_grad_enabled() else _NOTHING
        with quiet, deferred as interrupts, self.section:
            self.transfer.require_open()
            if self.claim is not None:
                self.claim()
            forward = current_forward.get()
            rows = _real_rows(forward, len(hidden))
            if rows is None:
                return self._event(_Call(layer, hidden, ids, weights, forward), interrupts)
            out = torch.zeros_like(hidden)
            call = _Call(layer, hidden[rows], ids[rows], weights[rows], forward, rows)
            out[rows] = self._event(call, interrupts)
            return out

    def _event(self, call: _Call, interrupts: Deferred | None) -> torch.Tensor:
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
        forward = call.forward
        phase = Phase.PREFILL if len(call.ids) > 1 else Phase.DECODE
        if call.layer == 0:
            meter = self.transfer.meter
            self._costs = replace(
                self._costs,
                link_bandwidth=self._known.link_bandwidth or meter.bandwidth,
                link_idle=meter.idle,
                queued=self.transfer.queued,
            )
        event = LayerEvent(
            step=forward.step if forward else self._clock.steps,
            layer=call.layer,
            phase=forward.phase if forward else phase,
            ids=self._read(call),
            weights=_Rows(call.weights),
            requests=forward.requests if forward else (),
            costs=self._costs,
        )
        if self.wants_scores:
            event.scores = self.lookahead.scores(forward, call.layer, call.rows)
        if forward is not None and self.director.route.wants_foretold:
            event.foretold = forward.foretold.pop(call.layer, None)
        if self.recording is not None:
            event.weights = list(event.weights)  # tensors may be used again after this call
            self.recording.append(event)
        return event

    def _depth(self) -> int:
        """How many layers the predictor wants to look ahead now."""
        return self.director.predictor.lookahead if self.director.switch.on else 0

    def _read(self, call: _Call) -> list[list[int]]:
        """The ids. Where the host must wait for them, look-ahead starts first and is read too."""
        if not self.compute.far:
            return call.ids.tolist()
        depth = self._depth()
        started = self.lookahead.start(call.forward, call.layer, depth) if depth else {}
        ids, *ahead = self.compute.read(call.ids, *started.values())
        call.started = dict(zip(started, ahead, strict=True)) or None
        found: list[list[int]] = ids
        return found

    def _carry_out(
        self, call: _Call, event: LayerEvent, interrupts: Deferred | None
    ) -> torch.Tensor:
        with self._lock:
            self.transfer.tend()
            plan = self.director.decide(event)
            if self.tap is not None:
                self.tap(plan.event)
            errand, foretell = None, self.director.route.wants_foretold
            if foretell or not self.director.ample or len(plan.hits) < len(plan.order):
                errand = _Errand(self.director, self.transfer, plan)
        if errand is None:  # all are here, and nobody ever leaves
            work, book = self._work(call, event, plan), self.director.book
            work.run([(e, book[e].index) for e in plan.order])
            return self._sum(work, call, plan.event)
        assert interrupts is not None, "an expert left a model that holds all of them"
        try:
            work = self._work(call, event, plan)
            self._errand(call, event, plan, errand, work, interrupts)
            return self._sum(work, call, plan.event)
        finally:
            with self._lock:
                errand.release()
                book = self.director.book
                held = self.director.ample and not book.free and all(map(book.ready, book))
                self._settled = held and not self.director.route.wants_foretold
            self._clock.stall_seconds += errand.stall_seconds

    def _sum(self, work: Work, call: _Call, event: LayerEvent) -> torch.Tensor:
        if self.watch is not None:
            out = work.out.view(work.tokens, work.k, -1)
            self.watch(Seen(event, call.forward, work.x, out))
        return work.sum()

    def _errand(
        self, call: _Call, event: LayerEvent, plan: LayerPlan, errand: _Errand, work: Work,
        interrupts: Deferred,
    ) -> None:  # fmt: skip
        """Compute hits while loads fly, then each load as it lands. A free link gets its guesses
        before anything is computed, a busy one after the hits: asking takes time. What the
        processor computes in host memory is computed when link and device have work."""
        asked = False
        while errand.todo:
            with self._lock:
                ready = errand.take_ready(interrupts)
            if not asked and (not ready or not errand.loading):
                asked = True
                self._look_ahead(call, event, plan, errand)
            if not ready:
                self._in_place(errand, work)
                with self._lock:
                    ready = errand.next_ready(interrupts)
            work.run(ready)
            with self._lock:
                errand.computed(ready)
        if not asked:
            self._look_ahead(call, event, plan, errand)
        self._in_place(errand, work)

    def _in_place(self, errand: _Errand, work: Work) -> None:
        """What takes no slot. The device may be waiting for it: counted as stall."""
        experts, errand.in_place = errand.in_place, ()
        if experts:
            started = time.perf_counter()
            work.run_in_place(experts)
            errand.stall_seconds += time.perf_counter() - started

    def _look_ahead(self, call: _Call, event: LayerEvent, plan: LayerPlan, errand: _Errand) -> None:
        """Ask later routers, and offer what the minds make of it to the idle link. ``event`` is as
        the router wanted it; whoever records it wants to know what was foreseen."""
        depth = self._depth()
        foretell = self.director.route.wants_foretold and plan.event.phase is Phase.DECODE
        if depth or foretell:
            found = self.lookahead.ask(
                call.forward, plan.event, max(1, depth), call.rows, call.started
            )
            event.lookahead = plan.event.lookahead = found
            if foretell and call.forward is not None and call.layer + 1 in found:
                ids, weights = found[call.layer + 1]
                call.forward.foretold = {call.layer + 1: (ids, list(weights))}
        with self._lock:
            errand.offer(self.director.foresee(plan.event))

    def _work(self, call: _Call, event: LayerEvent, plan: LayerPlan) -> Work:
        """The tokens by expert; what a policy changed about them is counted here."""
        weights = call.weights
        if plan.event is not event:
            weights = torch.tensor(plan.event.weights, dtype=weights.dtype, device=weights.device)
            self._clock.count_changes(event, plan.event)
        work = self.compute.begin(
            call.layer, call.x, plan.event.ids, weights, keep=self.watch is not None
        )
        if NOBODY in work:
            work.skip(NOBODY)
        if plan.skipped:
            self._clock.count_left_out(plan.event, plan.skipped)
        for expert in plan.skipped:
            work.skip(expert.expert)
        return work

    # ------------------------------------------------------------------------------------ the end

    def close(self) -> None:
        """Stop reading and give the memory back. Later calls of the model fail, and so does one
        that waits for an expert in another thread; one that computes finishes its event first."""
        self.transfer.close()
        with self.section:
            self.compute.close()


@dataclass(slots=True)
class _Call:
    """One call of the seam, padding left out: x [T, H], ids [T, k], weights [T, k]."""

    layer: int
    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    forward: Forward | None
    rows: torch.Tensor | None = None
    started: dict[int, Any] | None = None  # what look-ahead said while the ids were read


class _Errand:
    """One plan being carried out. Every method is called with the lock held.

    ``waiting``: loads whose victims cannot leave yet; ``todo``: experts not computed yet;
    ``in_place``: the same, of those that take no slot;
    ``pinned``: experts that must stay until they are.
    """

    def __init__(self, director: Director, transfer: Transfer, plan: LayerPlan) -> None:
        self.director, self.transfer = director, transfer
        self.todo, self.waiting = list(plan.order), list(plan.loads)
        self.in_place = plan.in_place
        self.loading = bool(plan.loads or plan.late)
        self.sweep = plan.event.phase is Phase.PREFILL
        self.prefetch: Sequence[Guess] | None = None
        self.pinned: set[ExpertId] = set()
        self.stall_seconds = 0.0
        for expert in (*plan.hits, *plan.late):
            self._pin(expert)
        for expert in plan.late:
            transfer.promote(expert)
        self._start_loads()
        if self.waiting:
            # What is queued would take the slot that one of these waits for, and never give it.
            transfer.speculate(())

    def take_ready(self, interrupts: Deferred) -> list[tuple[ExpertId, int]]:
        """All experts that are there, in order, with their slots."""
        interrupts.check()
        if self.waiting:
            self._start_loads()
        return self._take_ready()

    def next_ready(self, interrupts: Deferred) -> list[tuple[ExpertId, int]]:
        """The same; sleeps until there is one."""
        while True:
            ready = self.take_ready(interrupts)
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

    def computed(self, experts: Sequence[tuple[ExpertId, int]]) -> None:
        for expert, _ in experts:
            self._unpin(expert)

    def offer(self, guesses: Sequence[Guess]) -> None:
        """Speculation that replaces what is queued, once all loads of this event have started."""
        self.prefetch = guesses
        if not self.waiting:
            self._offer()

    def _offer(self) -> None:
        if self.prefetch is not None:
            self.transfer.speculate(self.prefetch)
            self.prefetch = None

    def release(self) -> None:
        """However the event ended, it holds nothing any more."""
        for expert in list(self.pinned):
            self._unpin(expert)

    def _start_loads(self) -> None:
        """Issue the loads whose victims can leave; speculation follows the last of them. A prompt
        needs most experts of a layer and all of them at the end: it reads them as they lie."""
        later, started = [], []
        for load in self.waiting:
            if self.director.may_start(load):
                started.append((load.expert, self.director.commit(load)))
                self._pin(load.expert)
            else:
                later.append(load)
        if started:
            self.transfer.demand_all(started, as_they_lie=self.sweep)
        self.waiting = later
        if not later:
            self._offer()

    def _pin(self, expert: ExpertId) -> None:
        self.director.book.pin(expert)
        self.pinned.add(expert)

    def _unpin(self, expert: ExpertId) -> None:
        self.pinned.discard(expert)
        slot = self.director.book.slot(expert)
        if slot is not None and slot.pins:  # a failed load has already given its slot back
            self.director.book.unpin(expert)


class _Rows(Sequence[Sequence[float]]):
    """The rows of a tensor as plain values, for the few minds that look at them."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def __len__(self) -> int:
        return len(self._tensor)

    def __getitem__(self, index: Any) -> Any:
        return self._tensor[index].float().tolist()

    def __iter__(self) -> Iterator[list[float]]:
        return iter(self._tensor.float().tolist())


def _real_rows(forward: Forward | None, tokens: int) -> Any:
    """Which rows are tokens and not padding; ``None``: all of them."""
    if forward is None or forward.rows is None or len(forward.rows) != tokens:
        return None
    return forward.rows
