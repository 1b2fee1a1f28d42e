"""The batching engine: one thread that turns asks into answers, step by step, for all at once.

Knows: the contracts of this room, threads. Does not know: HTTP, JSON, how a step is computed.

    submit (any thread) -> inbox -> [ step: who goes on -> one forward -> a token each -> sinks ]

What goes wrong in a step fails the requests of that step, with the reason; the next ones go on.
What goes wrong beside a step ends the thread: every request fails, and nothing is taken any more.
Nobody is ever left waiting.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable

import torch

from understudy import model as guest
from understudy.batch import (
    Ask,
    Busy,
    CannotFit,
    Chunk,
    Delta,
    Draining,
    EngineDied,
    Observer,
    Row,
    Seats,
    Snapshot,
    StepReport,
)
from understudy.batch.sampling import Sampler
from understudy.batch.schedule import Entry, Scheduler
from understudy.batch.text import Answer
from understudy.batch.ticket import Sink, Ticket
from understudy.core import Counters
from understudy.engine import Engine

log = logging.getLogger("understudy.batch")

IDLE = 0.5  # seconds between looks at the inbox when nobody asks; a new ask wakes the thread


class BatchEngine:
    """Continuous batching over one loaded model. Thread-safe; close it."""

    def __init__(
        self,
        engine: Engine,
        seats: Seats,
        *,
        max_num_seqs: int = 32,
        max_num_batched_tokens: int = 512,
        max_queue: int = 256,
        context: int | None = None,
    ) -> None:
        """``max_queue``: asks that may wait; more are refused as `Busy`. ``context``: most tokens
        of a prompt and its answer, those of the plan if not given."""
        self.engine, self.seats, self.tokenizer = engine, seats, engine.tokenizer
        self.context = min(context or engine.plan.context, seats.capacity)
        self.vocab_size = int(guest.text_config(engine.model.config).vocab_size)
        self.eos_ids = _eos_ids(engine)
        self.max_num_seqs, self.max_queue = max_num_seqs, max_queue
        self._scheduler = Scheduler(
            seats, max_rows=max_num_seqs, max_tokens=max_num_batched_tokens,
            max_every=engine.plan.scored_positions,
        )  # fmt: skip
        self._observers: list[Observer] = []
        self._ids = itertools.count()
        self._wake = threading.Condition()
        self._inbox: list[Ticket] = []
        self._tickets: dict[Row, Ticket] = {}  # not over yet, as the engine's thread knows them
        self._pending = 0  # submitted and not over
        self._draining = self._closing = False
        self._error: str | None = None
        self._kv_used = 0
        self._thread = threading.Thread(target=self._live, name="understudy-batch", daemon=True)
        self._thread.start()

    # --------------------------------------------------------------------------- from any thread

    def submit(self, ask: Ask, sink: Sink) -> Ticket:
        """Take ``ask``; ``sink`` gets its deltas on the engine's thread, the last one always.
        Raises a `Refused`: what it says is for the person who asked."""
        self._check(ask)
        row = Row(f"r{next(self._ids)}", list(ask.prompt))
        row.shares_prefix = ask.prompt_logprobs is None
        entry = Entry(row, ask.max_new_tokens > 0, ask.prompt_logprobs is not None)
        sampler = Sampler(ask, self.vocab_size, self.eos_ids)
        answer = Answer(self.tokenizer, ask, self.eos_ids)
        ticket = Ticket(ask, sink, entry, sampler, answer)
        with self._wake:
            self._require_open()
            if self._pending >= self.most:
                raise Busy(f"{self._pending} requests are running or waiting already; try later")
            self._pending += 1
            self._inbox.append(ticket)
            self._wake.notify()
        return ticket

    @property
    def most(self) -> int:
        """Asks that run and wait at once; one more is refused."""
        return self.max_num_seqs + self.max_queue

    def cancel(self, ticket: Ticket) -> None:
        """Nobody wants it any more: its place is free within one step. Harmless when it is over."""
        with self._wake:
            ticket.cancelled = True
            self._wake.notify()

    def add_observer(self, observer: Observer) -> None:
        self._observers.append(observer)

    def snapshot(self) -> Snapshot:
        s = self._scheduler
        return Snapshot(
            alive=self._error is None and self._thread.is_alive(),
            draining=self._draining,
            error=self._error,
            running=len(s.running),
            waiting=max(0, self._pending - len(s.running)),
            kv_used=self._kv_used,
            kv_total=self.seats.capacity,
            prefix_queries=s.prefix_queries,
            prefix_hits=s.prefix_hits,
            preemptions=s.preemptions,
            counters=self._counters(),
        )

    def drain(self, timeout: float) -> bool:
        """Take nothing new and finish what was taken. False: ``timeout`` seconds were not enough;
        what is left was aborted."""
        end = time.monotonic() + timeout
        with self._wake:
            self._draining = True
            while self._pending and self._error is None:
                left = end - time.monotonic()
                if left <= 0:
                    break
                self._wake.wait(min(left, IDLE))
            done = not self._pending
            for ticket in (*self._inbox, *self._tickets.values()):
                ticket.cancelled = True
            self._wake.notify_all()
        return done

    def close(self) -> None:
        """Abort what runs and end the thread. The engine beneath stays open. Repeatable."""
        with self._wake:
            self._draining = self._closing = True
            self._wake.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check(self, ask: Ask) -> None:
        prompt, new = len(ask.prompt), ask.max_new_tokens
        if not prompt:
            raise CannotFit("the prompt is empty; write something")
        wrong = next((t for t in ask.prompt if not 0 <= t < self.vocab_size), None)
        if wrong is not None:
            raise CannotFit(f"token {wrong} is not one of the model's {self.vocab_size}")
        if prompt + new > self.context:
            raise CannotFit(
                f"{prompt} prompt tokens and {new} new ones exceed the context of {self.context}; "
                "shorten the prompt or ask for fewer tokens"
            )
        scored = self._scheduler.max_every
        if self.seats.whole_prompts and ask.prompt_logprobs is not None and prompt > scored:
            raise CannotFit(
                f"logprobs of {prompt} prompt tokens at once exceed the {scored} that this model "
                "can have, whose prompts are read whole; shorten the prompt"
            )

    def _require_open(self) -> None:
        if self._error is not None:
            raise EngineDied(f"the engine has stopped ({self._error}); restart the server")
        if self._draining:
            raise Draining("the server is shutting down")

    def _counters(self) -> Counters:
        counters: Counters = self.engine.model.understudy.counters
        return counters

    # ------------------------------------------------------------------------- the engine's thread

    def _live(self) -> None:
        try:
            with torch.inference_mode(), guest.quiet():
                while self._wait_for_work():
                    self._step()
            self._abort(self._everybody())
        except BaseException as e:  # whatever it is, nobody may wait for this thread any more
            log.exception("the engine's thread has ended")
            self._error = f"{type(e).__name__}: {e}"[:200]
            self._fail(self._everybody(), EngineDied("the engine has stopped; restart the server"))
        finally:
            self.seats.close()

    def _everybody(self) -> list[Ticket]:
        with self._wake:
            inbox, self._inbox = self._inbox, []
        return [*self._tickets.values(), *inbox]

    def _wait_for_work(self) -> bool:
        """Until somebody asks; False: it is time to end."""
        with self._wake:
            while not (self._inbox or self._tickets or self._closing):
                self._wake.wait(IDLE)
            inbox, self._inbox = self._inbox, []
            for ticket in inbox:  # under the lock: who gives up draining looks at both
                self._tickets[ticket.entry.row] = ticket
                self._scheduler.add(ticket.entry)
            closing = self._closing
        self._abort([t for t in self._tickets.values() if t.cancelled])
        return not closing

    def _step(self) -> None:
        started, before = time.perf_counter(), self._counters()
        chunks = self._scheduler.next()
        self._kv_used = self.seats.used
        if not chunks:
            self._refuse_who_never_fits()
            return
        tickets = [self._tickets[chunk.row] for chunk in chunks]
        for ticket in tickets:
            ticket.begin(started, before, len(chunks))
        try:
            logits = self.seats.forward(chunks)
        except Exception as e:
            log.warning("a step has failed: %s", e)
            self._fail(tickets, e)
            return
        read = sum(map(Ticket.read_in, tickets, chunks))
        new = sum(map(self._guarded, tickets, chunks, logits))
        self._tell_step(started, before, read, new)

    def _refuse_who_never_fits(self) -> None:
        waiting = self._scheduler.waiting
        if waiting:
            ticket = self._tickets[waiting[0].row]
            self._fail([ticket], CannotFit("there is no room in the KV cache for this request"))

    def _guarded(self, ticket: Ticket, chunk: Chunk, logits: torch.Tensor | None) -> int:
        """What a step means for one request. What fails there is its own affair."""
        try:
            return self._advance(ticket, chunk, logits)
        except Exception as e:
            log.warning("request %s has failed: %s", ticket.entry.row.id, e)
            self._fail([ticket], e)
            return 0

    def _advance(self, ticket: Ticket, chunk: Chunk, logits: torch.Tensor | None) -> int:
        """1 if it got a token."""
        row = chunk.row
        if logits is not None and chunk.logits == "all":
            ticket.note_prompt(chunk, logits)
        if row.done < len(row.tokens):
            return 0
        if not ticket.entry.answers:
            self._send(ticket, Delta(prompt_logprobs=ticket.prompt_logprobs(), finish="length"))
            return 0
        assert logits is not None
        picked = ticket.sampler.pick(logits[-1], ticket.answered)
        now = time.perf_counter()
        if ticket.times:
            self._tell(lambda o: o.on_token(now - ticket.times[-1]))
        ticket.times.append(now)
        row.tokens.append(picked.token)
        ticket.entry.every = False
        delta = ticket.answer.add(picked, ticket.sampler.complete)
        delta.prompt_logprobs = ticket.prompt_logprobs()
        self._send(ticket, delta)
        return 1

    # --------------------------------------------------------------------------------- the ends

    def _abort(self, tickets: Iterable[Ticket]) -> None:
        for ticket in list(tickets):
            self._send(ticket, Delta(finish="abort"))

    def _fail(self, tickets: Iterable[Ticket], error: Exception) -> None:
        for ticket in list(tickets):
            self._send(ticket, Delta(error=error))

    def _send(self, ticket: Ticket, delta: Delta) -> None:
        if ticket.over:
            return
        if delta.last:
            delta.report = report = ticket.report(self._counters())
            self._leave(ticket)
            ticket.over = True  # not before: what raised here is told to it with everybody
            self._tell(lambda o: o.on_finish(ticket.ask, delta.finish or "error", report))
        try:
            ticket.sink(delta)
        except Exception:
            log.exception("a sink has failed; nobody listens to %s", ticket.entry.row.id)
            ticket.cancelled = True
        if delta.last:
            with self._wake:
                self._pending -= 1
                self._wake.notify_all()

    def _leave(self, ticket: Ticket) -> None:
        try:
            self._scheduler.remove(ticket.entry)
            self._kv_used = self.seats.used
        except Exception:
            if self._error is None:  # else this is what broke, and everybody is to be told
                raise
        self._tickets.pop(ticket.entry.row, None)

    def _tell_step(self, started: float, before: Counters, read: int, new: int) -> None:
        if not self._observers:
            return
        step = StepReport(
            seconds=time.perf_counter() - started,
            running=len(self._scheduler.running),
            waiting=len(self._scheduler.waiting),
            prompt_tokens=read,
            new_tokens=new,
            kv_used=self._kv_used,
            kv_total=self.seats.capacity,
            counters=self._counters() - before,
        )
        self._tell(lambda o: o.on_step(step))

    def _tell(self, what: Callable[[Observer], None]) -> None:
        for observer in self._observers:
            try:
                what(observer)
            except Exception:
                log.exception("%s has failed", type(observer).__name__)


def _eos_ids(engine: Engine) -> frozenset[int]:
    """Every token that ends an answer, by whoever knows of one."""
    model = engine.model
    found = [
        getattr(model.generation_config, "eos_token_id", None),
        getattr(guest.text_config(model.config), "eos_token_id", None),
        engine.tokenizer.eos_token_id,
    ]
    lists = (ids if isinstance(ids, list | tuple) else [ids] for ids in found)
    return frozenset(int(i) for ids in lists for i in ids if i is not None and i >= 0)
