"""Spans: one per request, with the caller's trace, OpenTelemetry's names and ours."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest
from serve.conftest import Client
from serve.fake_batch import FakeBatch
from serve.pretended import a_report

from understudy.batch import Ask, Delta, Finish, Sampling
from understudy.core import ReadFailed, UnderstudyError
from understudy.serve.tracing import ENDPOINTS, SpanTracer, Tracer, tracing

pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry is not installed")

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collected:
    """Traces that stay here."""

    def __init__(self) -> None:
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        self._exporter = InMemorySpanExporter()
        self.tracer = SpanTracer(SimpleSpanProcessor(self._exporter), "tiny")

    @property
    def spans(self) -> Sequence[Any]:
        return self._exporter.get_finished_spans()

    @property
    def only(self) -> Any:
        (span,) = self.spans
        return span


@pytest.fixture(autouse=True)
def _nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENDPOINTS:
        monkeypatch.delenv(name, raising=False)


def asks(count: int = 1, **sampling: Any) -> list[Ask]:
    return [Ask((1, 2), max_new_tokens=64, sampling=Sampling(**sampling))] * count


def last(finish: Finish = "stop", **report: Any) -> Delta:
    return Delta(finish=finish, report=a_report(**report))


def test_a_request_is_a_span_of_the_callers_trace() -> None:
    collected = Collected()
    trace = collected.tracer.begin("chat", {"traceparent": f"00-{TRACE}-{PARENT}-01"})
    trace.asked(asks(temperature=0.5, top_k=40), 1)
    trace.told(0, Delta(text="Once"))
    trace.told(0, last())
    assert not collected.spans
    trace.end()
    trace.end()
    told = collected.only
    assert told.name == "chat tiny"
    assert format(told.context.trace_id, "032x") == TRACE
    assert format(told.parent.span_id, "016x") == PARENT
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 64,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_k": 40,
        "gen_ai.response.finish_reasons": ("stop",),
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.response.time_to_first_chunk": 0.5,
        "gen_ai.latency.time_in_queue": 0.1,
        "gen_ai.latency.e2e": 1.4,
        "understudy.experts.hits": 70,
        "understudy.experts.misses": 8,
        "understudy.experts.bytes_read": 900,
        "understudy.experts.stall_seconds": 0.25,
    }
    assert expected.items() <= dict(told.attributes).items()
    assert "gen_ai.request.seed" not in told.attributes
    assert told.status.is_ok or told.status.is_unset


def test_several_answers_share_prompt_and_steps() -> None:
    collected = Collected()
    trace = collected.tracer.begin("text_completion", {})
    trace.asked(asks(2), 2)
    trace.told(1, last("length", completion_tokens=3, e2e_seconds=0.9))
    trace.told(0, last())
    trace.end()
    attributes = collected.only.attributes
    assert attributes["gen_ai.response.finish_reasons"] == ("stop", "length")
    assert attributes["gen_ai.usage.input_tokens"] == 12
    assert attributes["gen_ai.usage.output_tokens"] == 8
    assert attributes["understudy.experts.hits"] == 70
    assert collected.only.parent is None


def test_a_client_that_left_got_no_answer() -> None:
    collected = Collected()
    trace = collected.tracer.begin("chat", {})
    trace.asked(asks(), 1)
    trace.told(0, Delta(text="Once"))
    trace.end()
    assert collected.only.attributes["gen_ai.response.finish_reasons"] == ("abort",)


def test_a_failure_tells_its_kind_and_not_its_text() -> None:
    collected = Collected()
    trace = collected.tracer.begin("chat", {})
    trace.asked(asks(), 1)
    trace.told(0, Delta(error=ReadFailed("/where/it/lies"), report=a_report()))
    trace.failed("internal_error")
    trace.end()
    told = collected.only
    assert told.status.status_code.name == "ERROR"
    assert told.attributes["error.type"] == "internal_error"
    assert told.attributes["gen_ai.response.finish_reasons"] == ("error",)
    assert "/where/it/lies" not in told.to_json()


def test_an_answer_without_a_token_has_no_first_one() -> None:
    collected = Collected()
    trace = collected.tracer.begin("chat", {})
    trace.asked(asks(), 1)
    trace.told(0, last("length", completion_tokens=0))
    trace.end()
    assert "gen_ai.response.time_to_first_chunk" not in collected.only.attributes


def test_requests_over_http_are_traced(batch: FakeBatch) -> None:
    collected = Collected()
    client = Client(batch)
    client.app.state.tracer = collected.tracer
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
    for more in ({}, {"stream": True}, {"max_tokens": 1 << 30}):
        client.send("POST", "/v1/chat/completions", json=body | more, headers=headers)
    whole, stream, refused = collected.spans
    for told in (whole, stream):
        assert format(told.context.trace_id, "032x") == TRACE
        assert told.attributes["gen_ai.request.max_tokens"] == 3
        assert told.attributes["gen_ai.usage.output_tokens"] == 3
        assert told.attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert refused.attributes["error.type"] == "context_length_exceeded"


def test_nothing_is_traced_unless_asked_for() -> None:
    tracer = tracing(None, "tiny")
    assert type(tracer) is Tracer
    trace = tracer.begin("chat", {})
    trace.end()
    tracer.close()


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
        ("http://127.0.0.1:4318/", "http://127.0.0.1:4318/v1/traces"),
        ("http://127.0.0.1:4318/custom", "http://127.0.0.1:4318/custom"),
    ],
)
def test_the_flag_names_where_traces_go(
    given: str, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from opentelemetry.exporter.otlp.proto.http import trace_exporter

    seen = []
    original = trace_exporter.OTLPSpanExporter.__init__

    def note(self: Any, endpoint: str | None = None, **settings: Any) -> None:
        seen.append(endpoint)
        original(self, endpoint=endpoint, **settings)

    monkeypatch.setattr(trace_exporter.OTLPSpanExporter, "__init__", note)
    made = tracing(given, "tiny")
    assert isinstance(made, SpanTracer)
    made.close()
    assert seen == [used]


def test_opentelemetrys_own_variable_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    made = tracing(None, "tiny")
    assert isinstance(made, SpanTracer)
    made.close()


@pytest.mark.parametrize("wrong", ["localhost:4318", "grpc://x", "http://"])
def test_what_is_no_url_is_said_to_be_none(wrong: str) -> None:
    with pytest.raises(UnderstudyError, match="http://localhost:4318"):
        tracing(wrong, "tiny")


def test_a_missing_package_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = "opentelemetry.exporter.otlp.proto.http.trace_exporter"
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UnderstudyError, match=r"pip install 'understudy\[otel\]'"):
        tracing("http://127.0.0.1:4318", "tiny")
