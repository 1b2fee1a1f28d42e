"""The loaded model as the HTTP side sees it, and what the server can do at the moment.

Knows: what is asked of a batching engine, the names of the model, whether it is there yet.
Does not know: requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Protocol

from fastapi import Request

from understudy.batch import Ask, Delta, Observer, Snapshot
from understudy.batch.grammar import Grammars
from understudy.batch.tools import ToolFormat
from understudy.serve.collected import Spelling
from understudy.serve.errors import Problem, unavailable
from understudy.serve.settings import Settings
from understudy.serve.tracing import Tracing


class Batch(Protocol):
    """What the HTTP side needs of `batch.engine.BatchEngine`; tests bring their own."""

    engine: Any
    tokenizer: Any
    context: int
    vocab_size: int

    @property
    def most(self) -> int:
        """Asks that it takes at once, those that wait included."""

    @property
    def eos_ids(self) -> Collection[int]: ...

    def submit(self, ask: Ask, sink: Callable[[Delta], None]) -> Any: ...
    def cancel(self, ticket: Any) -> None: ...
    def snapshot(self) -> Snapshot: ...
    def add_observer(self, observer: Observer) -> None: ...
    def drain(self, timeout: float) -> bool: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Served:
    """A model that answers. ``most_characters``: no text longer than that can fit the context;
    ``created``: when it began to answer, a date that clients are shown."""

    batch: Batch
    settings: Settings
    grammars: Grammars
    tools: ToolFormat
    spelling: Spelling
    most_characters: int
    tracing: Tracing | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def of(cls, batch: Batch, settings: Settings, tracing: Tracing | None = None) -> Served:
        """May take a second: not on the loop."""
        tokenizer = batch.tokenizer
        longest = max(map(len, tokenizer.get_vocab()), default=1)
        return cls(
            batch,
            settings,
            Grammars(tokenizer, batch.vocab_size, batch.eos_ids),
            ToolFormat.of(settings.tool_call_parser, tokenizer, settings.chat_template),
            Spelling(tokenizer),
            most_characters=2 * longest * batch.context,  # twice: a normalizer may shorten a text
            tracing=tracing,
        )

    @property
    def tokenizer(self) -> Any:
        return self.batch.tokenizer

    def name(self, asked: str | None) -> str:
        """The name to answer by: the one that the client uses, if it is one of ours. What was typed
        on the command line is understood too, though it is not shown to anybody."""
        names = self.settings.names
        if asked is None:
            return names[0]
        if asked in names or asked == self.settings.model:
            return asked
        raise Problem(
            404,
            f"there is no model {asked[:80]!a} here; use {names[0]}",
            param="model",
            code="model_not_found",
        )


class Metrics(Protocol):
    """What ``/metrics`` shows: `metrics.Metrics`."""

    content_type: str

    def render(self) -> bytes: ...
    def on_response(self, handler: str, status: int) -> None: ...


class Stage:
    """What the server can do now: load, answer, or finish. Only the loop touches it."""

    def __init__(self) -> None:
        self.metrics: Metrics | None = None
        self.draining = False
        self._served: Served | None = None

    def open(self, served: Served, metrics: Metrics | None = None) -> None:
        """The model is loaded."""
        self._served, self.metrics = served, metrics

    def count(self, handler: str, status: int) -> None:
        """A response has left; those before the model is there are nobody's business."""
        if self.metrics is not None:
            self.metrics.on_response(handler, status)

    @property
    def opened(self) -> Served | None:
        return self._served

    def require(self) -> Served:
        """The model, whether or not it takes anything new: that the engine itself decides."""
        if self._served is None:
            raise loading()
        return self._served

    def require_health(self) -> None:
        """Raises what is wrong."""
        if self.draining:
            raise unavailable("the server is shutting down", "draining")
        if not self.require().batch.snapshot().alive:
            raise unavailable("the engine has stopped; restart the server", "engine_dead")


def loading() -> Problem:
    return unavailable("the model is loading", "loading", retry_after=5)


async def served(request: Request) -> Served:
    """The model, for endpoints that need one."""
    stage: Stage = request.app.state.stage
    return stage.require()
