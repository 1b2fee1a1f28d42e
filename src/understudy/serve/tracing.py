"""OpenTelemetry: one span per request, where somebody collects them.

Knows: OpenTelemetry's API and SDK, its GenAI names, what a report says. Does not know: HTTP beyond
the headers of a request. Nothing of a prompt or an answer is put into a span.

The packages are optional (``understudy[otel]``) and imported only where tracing was asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from understudy.batch import Report, Sampling
from understudy.core import UnderstudyError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor
    from opentelemetry.trace import Span

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")

Operation = Literal["chat", "text_completion"]


def tracing(endpoint: str | None, model_name: str) -> Tracing | None:
    """Tracing to ``endpoint`` (``--otlp-traces-endpoint``), else to where OpenTelemetry's own
    variables say; ``None`` where neither is set. Of ``http://host:4318`` its ``/v1/traces``."""
    if endpoint is None and not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise UnderstudyError(
            f"traces were asked for, and {error.name} is missing: pip install 'understudy[otel]'"
        ) from error
    exporter = OTLPSpanExporter(endpoint=None if endpoint is None else _whole(endpoint))
    return Tracing(BatchSpanProcessor(exporter), model_name)


def _whole(endpoint: str) -> str:
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UnderstudyError(
            f"--otlp-traces-endpoint {endpoint!r} is not a URL; write http://localhost:4318"
        )
    return endpoint if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/v1/traces"


class Tracing:
    """Begins a span for each request. Spans leave through ``processor``, on its own thread."""

    def __init__(self, processor: SpanProcessor, model_name: str) -> None:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        name = os.environ.get("OTEL_SERVICE_NAME", "understudy")
        self._provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}))
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("understudy")
        self._propagator = TraceContextTextMapPropagator()
        self._model = model_name

    def begin(
        self,
        operation: Operation,
        headers: Mapping[str, str],
        sampling: Sampling,
        *,
        max_tokens: int,
        choices: int = 1,
    ) -> RequestSpan:
        """A request has arrived. ``headers``: with the caller's ``traceparent``, if it has one;
        names in lower case. ``choices``: answers to each prompt."""
        from opentelemetry.trace import SpanKind

        span = self._tracer.start_span(
            f"{operation} {self._model}",
            context=self._propagator.extract(headers),
            kind=SpanKind.SERVER,
            attributes={
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "understudy",
                "gen_ai.request.model": self._model,
                "gen_ai.request.max_tokens": max_tokens,
                "gen_ai.request.choice.count": choices,
                **_chosen(sampling),
            },
        )
        return RequestSpan(span, self._model, choices)

    def close(self) -> None:
        """Send what is still here. Harmless when repeated."""
        self._provider.shutdown()


def _chosen(sampling: Sampling) -> dict[str, float]:
    """What was asked of the sampler, without what is off."""
    asked: dict[str, float | None] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or None,
        "seed": sampling.seed,
        "frequency_penalty": sampling.frequency_penalty or None,
        "presence_penalty": sampling.presence_penalty or None,
    }
    return {f"gen_ai.request.{name}": value for name, value in asked.items() if value is not None}


class RequestSpan:
    """One request under way. `end` or `fail` it once."""

    def __init__(self, span: Span, model_name: str, choices: int) -> None:
        self._span, self._model, self._choices = span, model_name, choices

    def end(self, reports: Sequence[Report], finishes: Sequence[str]) -> None:
        """All answers are finished (or aborted)."""
        self._span.set_attributes(
            {
                "gen_ai.response.model": self._model,
                "gen_ai.response.finish_reasons": tuple(finishes),
                **_usage(reports, self._choices),
                **_times(reports),
                **_experts(reports),
            }
        )
        self._span.end()

    def fail(self, error: BaseException) -> None:
        """There is no answer. Only the error's kind is told: its text may quote the request."""
        from opentelemetry.trace import StatusCode

        self._span.set_attribute("error.type", type(error).__name__)
        self._span.set_status(StatusCode.ERROR)
        self._span.end()


def _usage(reports: Sequence[Report], choices: int) -> dict[str, int]:
    return {
        # Each prompt is counted once, however many answers it got.
        "gen_ai.usage.input_tokens": sum(r.prompt_tokens for r in reports) // choices,
        "gen_ai.usage.cache_read.input_tokens": sum(r.cached_tokens for r in reports) // choices,
        "gen_ai.usage.output_tokens": sum(r.completion_tokens for r in reports),
    }


def _times(reports: Sequence[Report]) -> dict[str, float]:
    """OpenTelemetry's name of the first one, and vLLM's of all."""
    first = min((r.ttft_seconds for r in reports if r.completion_tokens), default=None)
    if first is None:
        return {}
    last = max(reports, key=lambda r: r.e2e_seconds)
    return {
        "gen_ai.response.time_to_first_chunk": first,
        "gen_ai.latency.time_to_first_token": first,
        "gen_ai.latency.time_in_queue": last.queue_seconds,
        "gen_ai.latency.time_in_model_prefill": last.prefill_seconds,
        "gen_ai.latency.time_in_model_decode": last.decode_seconds,
        "gen_ai.latency.e2e": last.e2e_seconds,
    }


def _experts(reports: Sequence[Report]) -> dict[str, Any]:
    """Of the answer that took longest: several answers share most of their steps, so a sum would
    count those twice."""
    if not reports:
        return {}
    last = max(reports, key=lambda r: r.e2e_seconds)
    counted = last.counters
    return {
        "understudy.experts.hits": counted.hits,
        "understudy.experts.late": counted.late,
        "understudy.experts.misses": counted.misses,
        "understudy.experts.bytes_read": counted.bytes_read,
        "understudy.experts.stall_seconds": counted.stall_seconds,
        "understudy.batch.mean": last.mean_batch,
    }
