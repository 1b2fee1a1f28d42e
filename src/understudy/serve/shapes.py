"""What is answered: the bodies of responses, as OpenAI's clients read them.

Knows: OpenAI's shapes, and ours where OpenAI has none. Does not know: how they are filled.
"""

from __future__ import annotations

import uuid
from typing import Any, Literal

from pydantic import BaseModel, Field

from understudy.batch import Report


def _is_none(value: Any) -> bool:
    return value is None


def omitted() -> Any:
    """The default of a field that is left out instead of being null: to a client that adds deltas
    up, ``"content": null`` is not the same as no content."""
    return Field(default=None, exclude_if=_is_none)


# -------------------------------------------------------------------------------- usage, experts


class CachedTokens(BaseModel):
    cached_tokens: int = 0


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


def usage_of(reports: list[Report], n: int) -> Usage:
    """``n`` answers share each prompt, which is counted once."""
    prompt = sum(report.prompt_tokens for report in reports[::n])
    completion = sum(report.completion_tokens for report in reports)
    cached = sum(report.cached_tokens for report in reports[::n])
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=prompt + completion,
        prompt_tokens_details=CachedTokens(cached_tokens=cached),
    )


class Experts(BaseModel):
    """What the experts did for one answer. The counters are those of the steps that it took part
    in; it shared them with ``mean_batch`` - 1 others."""

    hits: int
    late: int
    misses: int
    hit_rate: float
    stall_seconds: float
    bytes_read: int
    ttft_seconds: float
    tpot_seconds: float
    queue_seconds: float
    cached_tokens: int
    mean_batch: float


class ExpertsOfSeveral(BaseModel):
    """One for each choice, in the order of their indexes."""

    answers: list[Experts]


def experts_of(reports: list[Report]) -> Experts | ExpertsOfSeveral:
    told = [_experts(report) for report in reports]
    return told[0] if len(told) == 1 else ExpertsOfSeveral(answers=told)


def _experts(report: Report) -> Experts:
    c = report.counters
    return Experts(
        hits=c.hits,
        late=c.late,
        misses=c.misses,
        hit_rate=c.hits / c.lookups if c.lookups else 0.0,
        stall_seconds=c.stall_seconds,
        bytes_read=c.bytes_read,
        ttft_seconds=report.ttft_seconds,
        tpot_seconds=report.tpot_seconds,
        queue_seconds=report.queue_seconds,
        cached_tokens=report.cached_tokens,
        mean_batch=report.mean_batch,
    )


class Made(BaseModel):
    """What all responses with answers have."""

    id: str
    created: int
    model: str
    usage: Usage | None = omitted()
    understudy: Experts | ExpertsOfSeveral | None = omitted()


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


# ------------------------------------------------------------------------------------------- chat

Finish = Literal["stop", "length", "tool_calls"]


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatLogprob]
    refusal: None = None


class CalledFunction(BaseModel):
    name: str | None = omitted()
    arguments: str = ""


class CalledTool(BaseModel):
    id: str | None = omitted()
    type: Literal["function"] | None = omitted()
    function: CalledFunction


class CalledToolPiece(CalledTool):
    index: int


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[CalledTool] | None = omitted()


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish
    stop_reason: str | int | None = omitted()


class ChatCompletion(Made):
    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class ChatDelta(BaseModel):
    role: Literal["assistant"] | None = omitted()
    content: str | None = omitted()
    tool_calls: list[CalledToolPiece] | None = omitted()


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish | None = None
    stop_reason: str | int | None = omitted()


class ChatChunk(Made):
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]


# ------------------------------------------------------------------------------------ completions


LegacyFinish = Literal["stop", "length"]


class LegacyLogprobs(BaseModel):
    """Four lists of the same length. A prompt's first token has no logprob."""

    tokens: list[str] = Field(default_factory=list)
    token_logprobs: list[float | None] = Field(default_factory=list)
    top_logprobs: list[dict[str, float] | None] = Field(default_factory=list)
    text_offset: list[int] = Field(default_factory=list)


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: LegacyLogprobs | None = None
    finish_reason: LegacyFinish | None = None
    stop_reason: str | int | None = omitted()


class Completion(Made):
    """Whole, and in pieces while it streams."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


# ----------------------------------------------------------------------------------------- others


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "understudy"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = omitted()


class Text(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    """What a client needs in order to do without a tokenizer of its own."""

    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Version(BaseModel):
    version: str
