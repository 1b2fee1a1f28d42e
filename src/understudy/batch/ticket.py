"""One ask on its way: what it has been through, and the report at its end.

Knows: times, counts, the prompt's logprobs as they come in. Does not know: who decides about it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from understudy.batch import Ask, Chunk, Delta, Report, TokenLogprob
from understudy.batch.sampling import Sampler, logprobs_of
from understudy.batch.schedule import Entry
from understudy.batch.text import Answer
from understudy.core import Counters

Sink = Callable[[Delta], None]


@dataclass(eq=False)
class Ticket:
    """Only the engine's thread changes it, but for ``cancelled``. ``times``: of the tokens;
    ``before``: what was counted before its first step; ``shared``: rows of its steps, added up."""

    ask: Ask
    sink: Sink
    entry: Entry
    sampler: Sampler
    answer: Answer
    submitted: float = field(default_factory=time.perf_counter)
    begun: float = 0.0  # 0: no step yet
    times: list[float] = field(default_factory=list)
    before: Counters = field(default_factory=Counters)
    cached: int = 0
    steps: int = 0
    shared: int = 0
    told: list[TokenLogprob | None] = field(default_factory=list)  # of the prompt
    cancelled: bool = False
    over: bool = False

    @property
    def answered(self) -> list[int]:
        return self.entry.row.tokens[len(self.ask.prompt) :]

    def begin(self, now: float, before: Counters, rows: int) -> None:
        """It takes part in a step of so many rows."""
        if not self.begun:
            self.begun, self.before, self.cached = now, before, self.entry.row.done
        self.steps += 1
        self.shared += rows

    def read_in(self, chunk: Chunk) -> int:
        """Tokens of the prompt that the step of ``chunk`` has read."""
        prompt, done = len(self.ask.prompt), chunk.row.done
        return min(done, prompt) - min(done - chunk.count, prompt)

    def note_prompt(self, chunk: Chunk, logits: torch.Tensor) -> None:
        """Each position foretells the next token of the prompt."""
        first, top = chunk.row.done - chunk.count + 1, self.ask.prompt_logprobs
        next_ones = self.ask.prompt[first : first + chunk.count]
        if next_ones and top is not None:
            self.told[:1] = [None]
            # Not appended: a row that was pushed out reads its prompt once more.
            self.told[first:] = logprobs_of(logits[: len(next_ones)], next_ones, top)

    def prompt_logprobs(self) -> tuple[TokenLogprob | None, ...] | None:
        """Of the whole prompt, whose first token nobody foretold; once."""
        if self.ask.prompt_logprobs is None or self.times[1:]:
            return None
        return tuple(self.told) or (None,)

    def report(self, counters: Counters) -> Report:
        """``counters``: what is counted now."""
        now, times = time.perf_counter(), self.times
        n, begun = len(times), self.begun or now
        first = times[0] if times else now
        decode = times[-1] - first if times else 0.0
        return Report(
            prompt_tokens=len(self.ask.prompt),
            cached_tokens=self.cached,
            completion_tokens=n,
            queue_seconds=begun - self.submitted,
            ttft_seconds=first - self.submitted if times else 0.0,
            tpot_seconds=decode / (n - 1) if n > 1 else 0.0,
            prefill_seconds=first - begun,
            decode_seconds=decode,
            e2e_seconds=now - self.submitted,
            mean_batch=self.shared / self.steps if self.steps else 0.0,
            counters=counters - self.before if self.begun else Counters(),
        )
