"""Spans: one per request, with the caller's trace, OpenTelemetry's names and ours."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest
from serve.pretended import a_report

from understudy.batch import CannotFit, Sampling
from understudy.core import UnderstudyError
from understudy.serve.tracing import ENDPOINTS, Tracing, tracing

pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry is not installed")

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collected:
    """Tracing whose spans stay here."""

    def __init__(self) -> None:
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        self._exporter = InMemorySpanExporter()
        self.tracing = Tracing(SimpleSpanProcessor(self._exporter), "tiny")

    @property
    def spans(self) -> Sequence[Any]:
        return self._exporter.get_finished_spans()


@pytest.fixture(autouse=True)
def _nobody_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENDPOINTS:
        monkeypatch.delenv(name, raising=False)


def test_a_request_is_a_span_of_the_callers_trace() -> None:
    collected = Collected()
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    sampling = Sampling(temperature=0.5, top_k=40)
    span = collected.tracing.begin("chat", headers, sampling, max_tokens=64)
    assert not collected.spans
    span.end([a_report()], ["stop"])
    (told,) = collected.spans
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


def test_several_answers_share_prompt_and_steps() -> None:
    collected = Collected()
    span = collected.tracing.begin("text_completion", {}, Sampling(), max_tokens=5, choices=2)
    span.end([a_report(), a_report(completion_tokens=3, e2e_seconds=0.9)], ["stop", "length"])
    attributes = collected.spans[0].attributes
    assert attributes["gen_ai.usage.input_tokens"] == 12
    assert attributes["gen_ai.usage.output_tokens"] == 8
    assert attributes["understudy.experts.hits"] == 70
    assert collected.spans[0].parent is None


def test_a_failure_tells_its_kind_and_not_its_text() -> None:
    collected = Collected()
    span = collected.tracing.begin("chat", {}, Sampling(), max_tokens=5)
    span.fail(CannotFit("what the client wrote"))
    (told,) = collected.spans
    assert told.status.status_code.name == "ERROR"
    assert told.attributes["error.type"] == "CannotFit"
    assert "what the client wrote" not in told.to_json()


def test_an_answer_without_a_token_has_no_first_one() -> None:
    collected = Collected()
    span = collected.tracing.begin("chat", {}, Sampling(), max_tokens=5)
    span.end([a_report(completion_tokens=0)], ["abort"])
    assert "gen_ai.response.time_to_first_chunk" not in collected.spans[0].attributes


def test_nothing_is_traced_unless_asked_for() -> None:
    assert tracing(None, "tiny") is None


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
    assert made is not None
    made.close()
    assert seen == [used]


def test_opentelemetrys_own_variable_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    made = tracing(None, "tiny")
    assert made is not None
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
