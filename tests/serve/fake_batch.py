"""A batching engine without a model: a thread that answers what a script says, one token a step.

It keeps `BatchEngine`'s promises (deltas on its own thread, the last one always, `Busy` when full)
and can be told to break them: to be slow, to hang, to die with or without a word.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from understudy.batch import (
    Ask,
    Busy,
    CannotFit,
    Delta,
    Draining,
    EngineDied,
    Report,
    Snapshot,
    TokenLogprob,
)
from understudy.core import Counters

WORDS = " one two three four five six seven eight nine ten"


@dataclass(eq=False)
class Ticket:
    ask: Ask
    sink: Callable[[Delta], None]
    answer: Iterator[int]
    tokens: list[int] = field(default_factory=list)
    sent: str = ""
    cancelled: bool = False


class FakeBatch:
    """``says``: the answer to an ask; ``pace``: seconds a step."""

    def __init__(self, tokenizer: Any, *, context: int = 512, pace: float = 0.0) -> None:
        self.tokenizer, self.context, self.pace = tokenizer, context, pace
        self.vocab_size = len(tokenizer)
        self.eos_ids = frozenset({tokenizer.eos_token_id})
        self.engine = SimpleNamespace(close=lambda: None, plan=SimpleNamespace(line=lambda: "plan"))
        self.says: Callable[[Ask], str] = lambda ask: WORDS
        self.most = 256  # asks at once
        self.full = False  # of somebody else's
        self.fails: Exception | None = None  # what every answer ends with
        self.silent = False  # takes asks and never answers
        self.asks: list[Ask] = []
        self.cancelled = 0
        self._running: list[Ticket] = []
        self._wake = threading.Condition()
        self._draining = self._closing = False
        self._error: str | None = None
        self._thread = threading.Thread(target=self._live, daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------ as the server knows

    def submit(self, ask: Ask, sink: Callable[[Delta], None]) -> Ticket:
        if len(ask.prompt) + ask.max_new_tokens > self.context:
            raise CannotFit("too long")
        with self._wake:
            if self._error is not None:
                raise EngineDied(f"/secret/path: {self._error}")
            if self._draining:
                raise Draining("going")
            if self.full or len(self._running) >= self.most:
                raise Busy("too many", retry_after=2)
            ticket = Ticket(ask, sink, self._answer(ask))
            self.asks.append(ask)
            self._running.append(ticket)
            self._wake.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        with self._wake:
            if ticket in self._running:
                ticket.cancelled = True
                self.cancelled += 1
            self._wake.notify_all()

    def snapshot(self) -> Snapshot:
        return Snapshot(
            alive=self._error is None,
            draining=self._draining,
            error=self._error,
            running=len(self._running),
            waiting=0,
            kv_used=0,
            kv_total=self.context,
            prefix_queries=0,
            prefix_hits=0,
            preemptions=0,
            counters=Counters(),
        )

    def add_observer(self, observer: Any) -> None: ...

    def drain(self, timeout: float) -> bool:
        end = time.monotonic() + timeout
        with self._wake:
            self._draining = True
            while self._running and time.monotonic() < end:
                self._wake.wait(0.01)
            left = list(self._running)
            for ticket in left:
                ticket.cancelled = True
        return not left

    def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join(5)

    # ------------------------------------------------------------------------- as tests command

    def die(self, telling: bool = True) -> None:
        """The thread ends; ``telling``: with a last word to everybody, as the real one does."""
        with self._wake:
            self._error = "Traceback: /secret/path"
            left, self._running = self._running, []
            self._wake.notify_all()
        if telling:
            for ticket in left:
                self._send(ticket, Delta(error=EngineDied("/secret/path")))

    @property
    def running(self) -> int:
        return len(self._running)

    # ---------------------------------------------------------------------------- its own thread

    def _live(self) -> None:
        while self._error is None:
            with self._wake:
                while not (self._running or self._closing or self._error):
                    self._wake.wait(0.5)
                if self._closing or self._error:
                    break
                now = list(self._running)
            for ticket in now:
                self._step(ticket)
            time.sleep(self.pace)
        for ticket in list(self._running):
            self._end(ticket, Delta(finish="abort"))

    def _answer(self, ask: Ask) -> Iterator[int]:
        """The tokens said, then the end; over and over where there must be no end."""
        said = self.tokenizer(self.says(ask), add_special_tokens=False).input_ids
        while True:
            yield from said
            if not ask.ignore_eos:
                yield self.tokenizer.eos_token_id
                return

    def _step(self, ticket: Ticket) -> None:
        ask = ticket.ask
        if ticket.cancelled:
            return self._end(ticket, Delta(finish="abort"))
        if self.silent:
            return None
        if self.fails is not None:
            return self._end(ticket, Delta(error=self.fails))
        delta = Delta()
        if ask.prompt_logprobs is not None and not ticket.tokens:
            told = [logprob(t, ask.prompt_logprobs) for t in ask.prompt[1:]]
            delta.prompt_logprobs = (None, *told)
        if ask.max_new_tokens == 0:
            delta.finish = "length"
            return self._end(ticket, delta)
        token = next(ticket.answer)
        ticket.tokens.append(token)
        delta.tokens = (token,)
        if ask.logprobs is not None:
            delta.logprobs = (logprob(token, ask.logprobs),)
        text = ticket.sent + self.tokenizer.decode([token], skip_special_tokens=True)
        if token in self.eos_ids:
            delta.finish = "stop"
        elif len(ticket.tokens) >= ask.max_new_tokens:
            delta.finish = "length"
        for stop in ask.stop:
            if stop in text:  # (one that grows over two tokens is the real engine's affair)
                text = text[: text.index(stop)]
                delta.finish, delta.stop_reason = "stop", stop
        delta.text, ticket.sent = text[len(ticket.sent) :], text
        return self._end(ticket, delta) if delta.finish else self._send(ticket, delta)

    def _end(self, ticket: Ticket, delta: Delta) -> None:
        with self._wake:
            if ticket in self._running:
                self._running.remove(ticket)
            self._wake.notify_all()
        delta.report = Report(
            prompt_tokens=len(ticket.ask.prompt),
            cached_tokens=3,
            completion_tokens=len(ticket.tokens),
            queue_seconds=0.01,
            ttft_seconds=0.02,
            tpot_seconds=0.03,
            prefill_seconds=0.01,
            decode_seconds=0.1,
            e2e_seconds=0.2,
            mean_batch=1.5,
            counters=Counters(hits=30, late=5, misses=5, demand_bytes=100, stall_seconds=0.5),
        )
        self._send(ticket, delta)

    def _send(self, ticket: Ticket, delta: Delta) -> None:
        ticket.sink(delta)


def logprob(token: int, top: int) -> TokenLogprob:
    """Something that is the same every time."""
    own = -0.1 * (1 + token % 7)
    others = [(i, own - 1 - i) for i in range(1, top + 1) if i != token]
    return TokenLogprob(token, own, tuple([(token, own), *others][:top]))
