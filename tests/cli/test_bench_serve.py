"""bench serve, against a server whose every answer is known."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.conftest import Command
from cli.fake_server import FakeServer, serving

from understudy.traffic.result import METRICS

# What `vllm bench serve --save-result` writes with --percentile-metrics ttft,tpot,itl,e2el and
# --metric-percentiles 50,90,99.
VLLM = {
    "date", "endpoint_type", "model_id", "num_prompts", "request_rate", "burstiness",
    "max_concurrency", "duration", "completed", "failed", "total_input_tokens",
    "total_output_tokens", "request_throughput", "request_goodput", "output_throughput",
    "total_token_throughput", "max_concurrent_requests",
    *(f"{statistic}_{metric}_ms" for metric in METRICS
      for statistic in ("mean", "median", "std", "p50", "p90", "p99")),
}  # fmt: skip
OURS = {
    "arrivals", "time_scale", "length_scale", "clipped", "seed", "late_sends", "max_late_ms",
}  # fmt: skip

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,40,10
2023-11-16 18:15:46.7805900,400,20
2023-11-16 18:15:47.6805900,4,80
2023-11-16 18:15:48.6805900,20,1
"""


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with serving(FakeServer()) as fake:
        yield fake


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    file = tmp_path / "trace.csv"
    file.write_text(TRACE)
    return file


def test_the_keys_are_vllms(understudy: Command, server: FakeServer) -> None:
    ended = understudy(
        "bench", "serve", "--base-url", server.url, "--num-prompts", "6", "--random-input-len",
        "20", "--random-output-len", "5", "--json",
    )  # fmt: skip
    assert ended.code == 0, ended.err
    found = ended.json
    assert set(found) == VLLM | OURS
    assert (found["completed"], found["failed"]) == (6, 0)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (6 * 20, 6 * 5)
    assert found["model_id"] == "fake"
    assert found["request_rate"] == "inf"
    assert found["request_goodput"] is None
    assert found["output_throughput"] == pytest.approx(30 / found["duration"])
    assert 0 < found["p50_ttft_ms"] <= found["p99_ttft_ms"] <= found["p99_e2el_ms"]
    assert ended.out.count("\n") == 1


def test_what_is_sent(understudy: Command, server: FakeServer) -> None:
    understudy(
        "bench", "serve", "--base-url", server.url, "--num-prompts", "2", "--random-input-len",
        "20", "--random-output-len", "5", "--ignore-eos", "--api-key", "secret",
    )  # fmt: skip
    trial, *asked = server.asked
    assert trial["max_tokens"] == 1
    for body in asked:
        assert body["model"] == "fake"
        assert len(body["prompt"]) == 20
        assert (body["max_tokens"], body["temperature"], body["ignore_eos"]) == (5, 0.0, True)
        assert body["stream_options"] == {"include_usage": True}
    assert asked[0]["prompt"] != asked[1]["prompt"]
    assert server.keys == {"Bearer secret"}
    assert server.paths == {"/tokenize", "/v1/completions"}


def test_a_trace_is_scaled_and_clipped(
    understudy: Command, server: FakeServer, trace: Path
) -> None:
    ended = understudy(
        "bench", "serve", "--base-url", server.url, "--arrivals", str(trace), "--time-scale",
        "0.1", "--length-scale", "0.5", "--json",
    )  # fmt: skip
    found = ended.json
    lengths = sorted((len(body["prompt"]), body["max_tokens"]) for body in server.asked[1:])
    assert lengths == [(2, 40), (10, 1), (20, 5), (54, 10)]
    assert found["clipped"] == 1
    assert "1 of 4 requests clipped to 64 tokens" in ended.err
    assert found["request_rate"] is None
    assert 0.2 <= found["duration"] < 2


def test_a_goal_is_kept_or_not(understudy: Command, server: FakeServer) -> None:
    server.delay = 0.01
    common = ("bench", "serve", "--base-url", server.url, "--num-prompts", "3",
              "--random-output-len", "4", "--random-input-len", "8", "--json")  # fmt: skip
    lax = understudy(*common, "--goodput", "ttft:9000,tpot:9000").json
    assert lax["request_goodput"] == pytest.approx(lax["request_throughput"])
    strict = understudy(*common, "--goodput", "ttft:9000", "--goodput", "tpot:1").json
    assert strict["request_goodput"] == 0
    assert strict["mean_itl_ms"] >= 10
    # The first of the four tokens has no text, so TTFT ends with the second.
    assert strict["mean_tpot_ms"] == pytest.approx(2 / 3 * strict["mean_itl_ms"])


def test_no_more_at_a_time_than_asked(understudy: Command, server: FakeServer) -> None:
    server.delay = 0.005
    found = understudy(
        "bench", "serve", "--base-url", server.url, "--num-prompts", "8", "--max-concurrency",
        "2", "--random-input-len", "4", "--random-output-len", "4", "--json",
    ).json  # fmt: skip
    assert server.peak == 2 == found["max_concurrent_requests"]
    assert found["max_concurrency"] == 2


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("busy", "429 the queue is full"),
        ("error", "the disk failed"),
        ("no finish", "the stream ended before the answer did"),
        ("no usage", "no usage in the stream"),
    ],
)
def test_what_failed_is_counted_and_said(
    understudy: Command, server: FakeServer, fault: str, reason: str
) -> None:
    server.fault, server.every = fault, 2
    ended = understudy(
        "bench", "serve", "--base-url", server.url, "--num-prompts", "4", "--random-input-len",
        "4", "--random-output-len", "3", "--json",
    )  # fmt: skip
    assert (ended.json["completed"], ended.json["failed"]) == (2, 2)
    assert ended.json["total_output_tokens"] == 2 * 3
    assert f"2 failed: {reason}" in ended.err


def test_a_server_where_nothing_works_is_one_line(understudy: Command, server: FakeServer) -> None:
    server.fault = "busy"
    ended = understudy("bench", "serve", "--base-url", server.url)
    assert ended.code == 2
    assert f"{server.url}/v1/completions: 429 the queue is full" in ended.err
    server.fault = "no tokenize"
    ended = understudy("bench", "serve", "--base-url", server.url)
    assert ended.code == 2
    assert "has no /tokenize; name a --tokenizer" in ended.err


def test_the_result_is_written(
    understudy: Command, server: FakeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ("bench", "serve", "--base-url", server.url, "--num-prompts", "1",
              "--random-input-len", "4", "--random-output-len", "2")  # fmt: skip
    understudy(*common, "--save-result")
    (written,) = tmp_path.glob("openai-fake-*.json")
    assert json.loads(written.read_text())["completed"] == 1
    understudy(*common, "--result-filename", "mine.json")
    assert (tmp_path / "mine.json").is_file()


def test_a_table_for_people(understudy: Command, server: FakeServer) -> None:
    server.longest = None
    ended = understudy("bench", "serve", "--base-url", server.url, "--num-prompts", "2")
    assert "2 completed, 0 failed, 0 clipped" in ended.out
    assert [line.split()[0] for line in ended.out.splitlines()[-4:]] == list(METRICS)
    assert "nothing is clipped" in ended.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--base-url", "http://127.0.0.1:9"), "no server answers at http://127.0.0.1:9"),
        (("--endpoint", "/v1/chat/completions"), "use --endpoint /v1/completions"),
        (("--goodput", "speed:3"), "cannot read the goal 'speed:3'"),
        (("--percentile-metrics", "ttff"), "no metric 'ttff'; use ttft, tpot, itl, e2el"),
        (("--metric-percentiles", "101"), "cannot read '101' as percentiles"),
        (("--time-scale", "0"), "it must be more than 0, not 0"),
        (("--arrivals", "nowhere.csv"), "cannot read nowhere.csv"),
    ],
)
def test_mistakes_are_one_line(understudy: Command, arguments: tuple[str, ...], said: str) -> None:
    ended = understudy("bench", "serve", *arguments)
    assert ended.code == 2
    assert said in ended.err
    assert ended.err.count("\n") == 1
