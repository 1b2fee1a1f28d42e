"""Many requests through one model: what is asked, what comes back, and who does what.

Knows: the nouns of this room and the contracts between its parts. Does not know: HTTP, text on its
way in (prompts arrive as token ids), or how experts come and go.

    Ask -> `engine.BatchEngine.submit` -> `schedule.Scheduler` (which tokens form the next step)
        -> `Seats.forward` (transformers, one step for all)  -> `sampling.Sampler` (a token each)
        -> `text.Answer` (text, stop strings) -> Delta -> sink
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from understudy.core import Counters, UnderstudyError

Finish = Literal["stop", "length", "abort"]

# ------------------------------------------------------------------------------- what is asked


class Matcher(Protocol):
    """Where one answer stands in its grammar."""

    def constrain(self, scores: torch.Tensor) -> None:
        """Put -inf on every token of ``scores`` [V] that may not come next, in place."""

    def accept(self, token: int) -> None:
        """The answer goes on with ``token``."""

    @property
    def complete(self) -> bool:
        """Nothing but the end may follow."""


class Grammar(Protocol):
    """What an answer must look like; compiled once, begun for every answer."""

    def begin(self) -> Matcher: ...


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is picked. The defaults are those of OpenAI's API; ``temperature`` 0 is greedy.

    Applied in this order: grammar, logit_bias, repetition, presence and frequency penalty,
    temperature, top_k, top_p, min_p. ``seed``: of this answer alone, whoever else is in the batch.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """One answer wanted. ``logprobs``: that many alternatives beside each token, 0 for only the
    token's own, ``None`` for none; ``prompt_logprobs``: the same about the prompt."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False  # leave the stop string in the text
    ignore_eos: bool = False
    min_tokens: int = 0  # no end of any kind before that many
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None
    skip_special_tokens: bool = True


# -------------------------------------------------------------------------------- what comes back


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """``logprob``: natural logarithm, of the model's own distribution before any processor.
    ``top``: (token, logprob) of the likeliest, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """One finished answer. Seconds by a monotonic clock. ``counters``: of the steps that this
    answer took part in, which it shared with others (``mean_batch`` of them, itself included)."""

    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the KV cache
    completion_tokens: int
    queue_seconds: float  # submitted -> first step
    ttft_seconds: float  # submitted -> first token; 0 where there is none
    tpot_seconds: float  # (last - first token) / (tokens - 1)
    prefill_seconds: float  # first step -> first token
    decode_seconds: float  # first -> last token
    e2e_seconds: float
    mean_batch: float
    counters: Counters


@dataclass(slots=True)
class Delta:
    """What a step has added to an answer. The last one has ``finish`` or ``error``, and a
    ``report``. ``stop_reason``: the stop string or token id that ended it; ``None``: the model's
    own end. ``prompt_logprobs``: once, before or with the first token; its first entry is None."""

    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish: Finish | None = None
    stop_reason: str | int | None = None
    error: Exception | None = None
    report: Report | None = None

    @property
    def last(self) -> bool:
        return self.finish is not None or self.error is not None


@dataclass(frozen=True, slots=True)
class StepReport:
    """One step, for whoever watches. ``counters``: what this step did; ``new``: tokens sampled."""

    seconds: float
    running: int
    waiting: int
    prompt_tokens: int
    new_tokens: int
    kv_used: int  # tokens
    kv_total: int
    counters: Counters


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The engine now. ``error``: why it died, or ``None``. ``prefix_queries``, ``prefix_hits``:
    prompt tokens looked up in the KV cache and found there, since the start."""

    alive: bool
    draining: bool
    error: str | None
    running: int
    waiting: int
    kv_used: int
    kv_total: int
    prefix_queries: int
    prefix_hits: int
    preemptions: int
    counters: Counters


class Observer(Protocol):
    """Told on the engine's thread: be quick, never raise."""

    def on_step(self, step: StepReport) -> None: ...
    def on_token(self, seconds: float) -> None:
        """A token of an answer came ``seconds`` after its predecessor."""

    def on_finish(self, ask: Ask, finish: str, report: Report) -> None:
        """``finish``: stop, length, abort or error."""


# -------------------------------------------------------------------------------------- refusals


class Refused(UnderstudyError):
    """A request that is not taken. ``retry_after``: seconds after which it may be, or ``None``."""

    retry_after: float | None = None


class CannotFit(Refused):
    """It could never run within the budget: prompt or answer too long."""


class Busy(Refused):
    """The queue is full."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Draining(Refused):
    """The server is shutting down and takes nothing new."""


class EngineDied(Refused):
    """The engine's thread has ended; nothing will be answered until the server is restarted."""


# ----------------------------------------------------------------------- between engine and model


@dataclass(eq=False, slots=True)
class Row:
    """One sequence while it runs: ``tokens`` known so far (prompt and answer), of which ``done``
    are in the KV cache. ``state``: whatever its `Seats` keep of it."""

    id: str
    tokens: list[int]
    done: int = 0
    shares_prefix: bool = True  # False: every position must really be computed
    state: Any = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """``count`` tokens of ``row`` from ``row.done`` on, that the next step works on. ``logits``:
    of no position, of the last one, or of all (what prompt logprobs need)."""

    row: Row
    count: int
    logits: Literal["none", "last", "all"]

    @property
    def wanted(self) -> int:
        """Positions at its end whose logits somebody wants."""
        return {"none": 0, "last": 1, "all": self.count}[self.logits]


class Seats(Protocol):
    """Where the KV caches of running sequences are, and the forward over all of them.
    Single-threaded: only the engine's thread calls it."""

    capacity: int  # tokens that all rows together can hold
    prefix_sharing: bool
    whole_prompts: bool  # a prompt cannot be read in chunks

    def admit(self, row: Row) -> int:
        """A row comes in. Sets ``row.done`` to the tokens of its beginning that are in the cache
        already (never all of them), and answers with that."""

    def reserve(self, row: Row, count: int) -> bool:
        """Room for ``count`` tokens more after ``row.done``; False: there is none, nothing
        changed."""

    def forward(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | None]:
        """One step. Per chunk logits [1 or count, V] in float32, or ``None``. Room was reserved.
        Advances ``row.done``. Raises what the model raises; then no row of the step has moved, or
        all of them must be released."""

    def release(self, row: Row) -> None:
        """The row leaves, nothing of it is done any more; harmless when repeated."""

    def close(self) -> None:
        """The model is as it was before."""

    @property
    def used(self) -> int:
        """Tokens that running rows hold (shared ones once)."""
