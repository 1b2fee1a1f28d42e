"""What Prometheus reads: every name, numbers that are the engine's, counters that never fall."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serve.pretended import AN_ASK, EXPERT_BYTES, SLOT_BYTES, PretendedBatch, a_report, a_step

from understudy.serve.metrics import Metrics

GAUGES = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"}
HISTOGRAMS = {
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_time_per_output_token_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
}
COUNTERS = {
    "prefix_cache_queries",
    "prefix_cache_hits",
    "prompt_tokens",
    "generation_tokens",
    "request_success",
    "num_preemptions",
    "http_requests",
    "expert_lookups",
    "expert_transfer_bytes",
    "expert_prefetch",
    "expert_stall_seconds",
    "expert_cache_evictions",
}

Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture
def batch() -> PretendedBatch:
    return PretendedBatch()


@pytest.fixture
def metrics(batch: PretendedBatch) -> Metrics:
    return Metrics(batch, "tiny")


def scraped(metrics: Metrics) -> Values:
    """(name without our prefix, labels but the model's) -> value."""
    values: Values = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            if sample.name.startswith("understudy:"):
                labels = dict(sample.labels)
                assert labels.pop("model_name") == "tiny"
                key = sample.name.removeprefix("understudy:"), tuple(sorted(labels.items()))
                values[key] = sample.value
    return values


def labelled(name: str, values: Values) -> dict[str, float]:
    """The values of a metric with one label, by that label."""
    return {labels[0][1]: value for (n, labels), value in values.items() if n == name}


def test_every_documented_name_is_there_with_its_type(metrics: Metrics) -> None:
    metrics.on_response("/v1/models", 200)
    families = list(text_string_to_metric_families(metrics.render().decode()))
    types = {f.name.removeprefix("understudy:"): f.type for f in families}
    ours = {f.name.removeprefix("understudy:") for f in families if f.name.startswith("understudy")}
    assert ours == GAUGES | HISTOGRAMS | COUNTERS | {"expert_cache_bytes"}
    assert {types[name] for name in GAUGES | {"expert_cache_bytes"}} == {"gauge"}
    assert {types[name] for name in HISTOGRAMS} == {"histogram"}
    assert {types[name] for name in COUNTERS} == {"counter"}
    assert "process_resident_memory_bytes" in types


def test_the_documentation_names_exactly_these() -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    told = page.partition("`/metrics` has")[2].partition("```")[0]
    named = {name.removesuffix("_total") for name in re.findall("`([a-z0-9_]+)`", told)}
    assert named == GAUGES | HISTOGRAMS | COUNTERS | {"expert_cache_bytes"}


def test_experts_are_what_the_engine_counted(batch: PretendedBatch, metrics: Metrics) -> None:
    batch.event(0, [1, 2], [2, 3])
    batch.event(0, [1, 4])
    batch.extra.stall_seconds = 1.5
    values = scraped(metrics)
    lookups = labelled("expert_lookups_total", values)
    assert lookups["hit"] == 1
    assert lookups["miss"] == 4
    kinds = ("hit", "late", "miss", "cpu")
    assert sum(lookups[kind] for kind in kinds) == batch.snapshot().counters.lookups
    move = (("from", "disk"), ("reason", "demand"), ("to", "host"))
    assert values["expert_transfer_bytes_total", move] == 4 * EXPERT_BYTES
    assert labelled("expert_cache_bytes", values) == {"host": 4 * SLOT_BYTES}
    assert values["expert_stall_seconds_total", ()] == 1.5


def test_in_place_and_late_are_counted_once(batch: PretendedBatch, metrics: Metrics) -> None:
    batch.extra.misses, batch.extra.computed_in_place = 5, 3
    batch.extra.late, batch.extra.prefetch_used, batch.extra.prefetch_wasted = 2, 6, 1
    values = scraped(metrics)
    lookups, prefetch = (
        labelled(f"{name}_total", values) for name in ("expert_lookups", "expert_prefetch")
    )
    assert (lookups["miss"], lookups["cpu"], lookups["late"]) == (2, 3, 2)
    assert prefetch == {"used": 4, "late": 2, "wasted": 1, "cancelled": 0}


def test_a_counter_never_falls(batch: PretendedBatch, metrics: Metrics) -> None:
    read = (
        "expert_transfer_bytes_total",
        (("from", "disk"), ("reason", "prefetch"), ("to", "host")),
    )
    seen = []
    for nbytes in (500, 300, 900):  # a speculation given up takes back what it did not read
        batch.extra.prefetch_bytes = nbytes
        seen.append(scraped(metrics)[read])
    assert seen == [500, 500, 900]


def test_queue_and_cache(batch: PretendedBatch, metrics: Metrics) -> None:
    batch.now |= {"running": 3, "waiting": 7}
    values = scraped(metrics)
    assert values["num_requests_running", ()] == 3
    assert values["num_requests_waiting", ()] == 7
    assert values["kv_cache_usage_perc", ()] == 0.25
    assert values["prefix_cache_queries_total", ()] == 9
    assert values["prefix_cache_hits_total", ()] == 4
    assert values["num_preemptions_total", ()] == 2


def test_an_answer_is_seen_in_every_histogram(metrics: Metrics) -> None:
    metrics.on_step(a_step(prompt_tokens=12, new_tokens=1))
    metrics.on_step(a_step(new_tokens=4))
    metrics.on_token(0.2)
    metrics.on_finish(AN_ASK, "stop", a_report())
    values = scraped(metrics)
    assert values["prompt_tokens_total", ()] == 12
    assert values["generation_tokens_total", ()] == 5
    assert values["time_to_first_token_seconds_sum", ()] == 0.5
    assert all(values[f"{name}_count", ()] == 1 for name in HISTOGRAMS)
    reasons = labelled("request_success_total", values)
    assert reasons == {"stop": 1, "length": 0, "abort": 0, "error": 0}


def test_who_got_no_token_has_no_first_one(metrics: Metrics) -> None:
    metrics.on_finish(AN_ASK, "abort", a_report(completion_tokens=0, ttft_seconds=0.0))
    values = scraped(metrics)
    assert values["time_to_first_token_seconds_count", ()] == 0
    assert values["request_time_per_output_token_seconds_count", ()] == 0
    assert values["request_queue_time_seconds_count", ()] == 1


def test_lengths_have_a_bucket_for_the_longest(metrics: Metrics) -> None:
    buckets = [
        float(dict(labels)["le"])
        for (name, labels) in scraped(metrics)
        if name == "request_prompt_tokens_bucket"
    ]
    assert sorted(buckets)[-2:] == [1000.0, float("inf")]  # the context is 512


def test_responses_are_counted_by_route_and_status(metrics: Metrics) -> None:
    for status in (200, 200, 429):
        metrics.on_response("/v1/completions", status)
    values = scraped(metrics)
    route = ("handler", "/v1/completions")
    assert values["http_requests_total", (route, ("status", "200"))] == 2
    assert values["http_requests_total", (route, ("status", "429"))] == 1
