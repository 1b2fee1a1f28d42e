"""What Prometheus scrapes: vLLM's metrics under our prefix, and what experts do.

Knows: prometheus-client, the engine's snapshot and its reports. Does not know: HTTP.

Every number has one source. What the engine counts (experts, queue, caches) is read from its
snapshot while it is scraped; what it only reports (tokens, latencies) is summed here as it comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from understudy.batch import Ask, Report, Snapshot, StepReport
from understudy.core import Counters
from understudy.serve.cache_view import CacheView
from understudy.serve.served import Batch

# A second series beside each counter and histogram, which nobody reads.
disable_created_metrics()  # type: ignore[no-untyped-call]

PREFIX = "understudy:"
FINISHES = ("stop", "length", "abort", "error")

# vLLM's buckets. A first token that waits for experts from a disk may take minutes; between tokens
# a small model takes milliseconds, so that end has three more.
TTFT = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
BETWEEN_TOKENS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
    5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
WHOLE_REQUEST = (
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0,
    60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip


class Metrics:
    """An `Observer` of ``batch`` and what it says to Prometheus. ``model_name``: the label that all
    metrics carry."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, batch: Batch, model_name: str) -> None:
        self._model = model_name
        self._registry = CollectorRegistry()
        self._registry.register(_Scrape(batch, model_name))
        ProcessCollector(registry=self._registry)
        self._prompt = self._counter("prompt_tokens", "Prompt tokens worked through")
        self._generated = self._counter("generation_tokens", "Tokens generated")
        self._finished = Counter(
            f"{PREFIX}request_success",
            "Finished answers, by why they ended",
            ("model_name", "finished_reason"),
            registry=self._registry,
        )
        for reason in FINISHES:
            self._finished.labels(model_name, reason)
        self._requests = Counter(
            f"{PREFIX}http_requests",
            "Answered HTTP requests",
            ("model_name", "handler", "status"),
            registry=self._registry,
        )
        self._define_latencies()
        self._define_lengths(batch.context)

    def _define_latencies(self) -> None:
        seconds = self._histogram
        self._ttft = seconds("time_to_first_token_seconds", "Arrival to first token", TTFT)
        self._itl = seconds(
            "inter_token_latency_seconds", "Between two tokens of an answer", BETWEEN_TOKENS
        )
        self._tpot = seconds(
            "request_time_per_output_token_seconds",
            "(Last token - first token) / (tokens - 1), once per answer",
            BETWEEN_TOKENS,
        )
        self._e2e = seconds("e2e_request_latency_seconds", "Arrival to last token", WHOLE_REQUEST)
        self._queue = seconds("request_queue_time_seconds", "Arrival to first step", WHOLE_REQUEST)
        self._prefill = seconds(
            "request_prefill_time_seconds", "First step to first token", WHOLE_REQUEST
        )
        self._decode = seconds(
            "request_decode_time_seconds", "First token to last token", WHOLE_REQUEST
        )

    def _define_lengths(self, longest: int) -> None:
        buckets = _steps_of_1_2_5(longest)
        self._prompt_lengths = self._histogram(
            "request_prompt_tokens", "Prompt tokens of a finished answer", buckets
        )
        self._answer_lengths = self._histogram(
            "request_generation_tokens", "Generated tokens of a finished answer", buckets
        )

    def _counter(self, name: str, about: str) -> Counter:
        family = Counter(f"{PREFIX}{name}", about, ("model_name",), registry=self._registry)
        return family.labels(self._model)

    def _histogram(self, name: str, about: str, buckets: Sequence[float]) -> Histogram:
        family = Histogram(
            f"{PREFIX}{name}", about, ("model_name",), registry=self._registry, buckets=buckets
        )
        return family.labels(self._model)

    def render(self) -> bytes:
        """Everything, in Prometheus' text format."""
        return generate_latest(self._registry)

    # --------------------------------------------------------------------- what is told as it comes

    def on_step(self, step: StepReport) -> None:
        self._prompt.inc(step.prompt_tokens)
        self._generated.inc(step.new_tokens)

    def on_token(self, seconds: float) -> None:
        self._itl.observe(seconds)

    def on_finish(self, ask: Ask, finish: str, report: Report) -> None:
        self._finished.labels(self._model, finish).inc()
        self._queue.observe(report.queue_seconds)
        self._e2e.observe(report.e2e_seconds)
        self._prompt_lengths.observe(report.prompt_tokens)
        self._answer_lengths.observe(report.completion_tokens)
        if report.completion_tokens:
            self._ttft.observe(report.ttft_seconds)
            self._prefill.observe(report.prefill_seconds)
            self._decode.observe(report.decode_seconds)
        if report.completion_tokens > 1:
            self._tpot.observe(report.tpot_seconds)

    def on_response(self, handler: str, status: int) -> None:
        """An HTTP request was answered. ``handler``: the route's own path ("/v1/models"), never
        what a client wrote: labels must not grow with what clients invent."""
        self._requests.labels(self._model, handler, str(status)).inc()


class _Scrape(Collector):
    """What the engine counts itself, asked at the moment of the scrape."""

    def __init__(self, batch: Batch, model_name: str) -> None:
        self._batch, self._model = batch, model_name
        self._cache = CacheView(batch.engine)
        self._highest: dict[tuple[str, ...], float] = {}

    def describe(self) -> list[Metric]:
        """Nothing: asking the engine for its names would be a scrape."""
        return []

    def collect(self) -> Iterator[Metric]:
        snapshot = self._batch.snapshot()
        yield from self._queue(snapshot)
        yield from self._experts(snapshot.counters)
        yield self._gauge(
            "expert_cache_bytes",
            "Bytes of the experts that are in slots now",
            self._cache.resident_bytes,
            tier=self._cache.fast.value,
        )

    def _queue(self, now: Snapshot) -> Iterator[Metric]:
        yield self._gauge("num_requests_running", "Answers in the running batch", now.running)
        yield self._gauge("num_requests_waiting", "Answers waiting for their turn", now.waiting)
        used = now.kv_used / now.kv_total if now.kv_total else 0.0
        yield self._gauge("kv_cache_usage_perc", "Share of the KV cache in use, 1 is all", used)
        yield self._counter(
            "prefix_cache_queries", "Prompt tokens looked up in the KV cache", now.prefix_queries
        )
        yield self._counter("prefix_cache_hits", "Those of them found there", now.prefix_hits)
        yield self._counter(
            "num_preemptions", "Running answers that were sent back to the queue", now.preemptions
        )

    def _experts(self, c: Counters) -> Iterator[Metric]:
        yield self._by(
            "expert_lookups",
            "hit, late, miss, cpu (a miss computed where it lies): one each per event and expert; "
            "substituted, skipped: (token, rank) pairs that ran as another expert or not at all",
            "outcome",
            {
                "hit": c.hits,
                "late": c.late,
                "miss": c.misses - c.computed_in_place,
                "cpu": c.computed_in_place,
                "substituted": c.substituted,
                "skipped": c.skipped,
            },
        )
        yield self._by(
            "expert_prefetch",
            "Speculated experts: used in time, used but late, evicted or given up unused (wasted), "
            "or cancelled before they were read",
            "outcome",
            {
                "used": c.prefetch_used - c.late,
                "late": c.late,
                "wasted": c.prefetch_wasted,
                "cancelled": c.prefetch_cancelled,
            },
        )
        yield self._transfers(c)
        yield self._counter(
            "expert_stall_seconds", "Seconds in which computing waited for experts", c.stall_seconds
        )
        yield self._counter(
            "expert_cache_evictions", "Experts that left their slot to another", c.evictions
        )

    def _transfers(self, c: Counters) -> Metric:
        family = CounterMetricFamily(
            f"{PREFIX}expert_transfer_bytes",
            "Bytes of experts moved between tiers",
            labels=("model_name", "from", "to", "reason"),
        )
        tiers = self._cache.slow.value, self._cache.fast.value
        for reason, nbytes in (("demand", c.demand_bytes), ("prefetch", c.prefetch_bytes)):
            value = self._never_less(nbytes, "transfer", reason)
            family.add_metric((self._model, *tiers, reason), value)
        return family

    def _by(self, name: str, about: str, label: str, values: dict[str, float]) -> Metric:
        family = CounterMetricFamily(f"{PREFIX}{name}", about, labels=("model_name", label))
        for key, value in values.items():
            family.add_metric((self._model, key), self._never_less(value, name, key))
        return family

    def _counter(self, name: str, about: str, value: float) -> Metric:
        family = CounterMetricFamily(f"{PREFIX}{name}", about, labels=("model_name",))
        family.add_metric((self._model,), self._never_less(value, name))
        return family

    def _gauge(self, name: str, about: str, value: float, **labels: str) -> Metric:
        family = GaugeMetricFamily(f"{PREFIX}{name}", about, labels=("model_name", *labels))
        family.add_metric((self._model, *labels.values()), value)
        return family

    def _never_less(self, value: float, *key: str) -> float:
        """To Prometheus a counter that falls is a process that restarted. A speculation that is
        given up takes back the bytes it will not read, so its counter may fall a little."""
        highest = self._highest[key] = max(value, self._highest.get(key, 0.0))
        return highest


def _steps_of_1_2_5(longest: int) -> list[float]:
    """1, 2, 5, 10, ... up to and including the first that is not below ``longest``."""
    steps: list[float] = []
    while not steps or steps[-1] < longest:
        steps.append((1, 2, 5)[len(steps) % 3] * 10 ** (len(steps) // 3))
    return steps
