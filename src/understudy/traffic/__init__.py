"""Traffic at an OpenAI-compatible server, Understudy's or anybody's: who asks when, and what came
of it.

Knows: the nouns of this room. Does not know: our engine; the server is met over HTTP only.

    workload: lengths and times -> Request   client: Request -> HTTP -> Answer
    result: Answers -> the keys of ``vllm bench serve``
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Answer", "Request"]


@dataclass(frozen=True, slots=True)
class Request:
    """``at``: seconds after the start of the replay."""

    at: float
    prompt_tokens: int
    output_tokens: int


@dataclass(slots=True)
class Answer:
    """What a client saw of one answer. Seconds by a monotonic clock.

    ``late``: sent so long after its time; ``ttft``: sent -> first text; ``gaps``: between one chunk
    of text and the next; ``e2e``: sent -> end of the text. ``error``: why it does not count.
    """

    late: float
    prompt_tokens: int = 0
    output_tokens: int = 0
    ttft: float = 0.0
    e2e: float = 0.0
    gaps: list[float] = field(default_factory=list)
    error: str | None = None

    @property
    def tpot(self) -> float | None:
        """(end - first) / (tokens - 1); ``None``: there was one token."""
        later = self.output_tokens - 1
        return (self.e2e - self.ttft) / later if later > 0 else None
