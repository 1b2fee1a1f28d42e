"""``understudy bench serve``: a workload against any OpenAI-compatible server.

Knows: options, which are called as in ``vllm bench serve``; how figures become a table.
Does not know: how requests are sent (`traffic.client`), what figures mean (`traffic.result`).
"""

from __future__ import annotations

import asyncio
import json as json_module
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from math import inf
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from understudy.cli import screen
from understudy.cli.options import Json, option, takes_options
from understudy.core import UnderstudyError
from understudy.traffic import Answer, Request
from understudy.traffic.workload import Prompts, at_rate, clip, from_trace, of_random_length

if TYPE_CHECKING:
    from understudy.traffic.client import Replayed, Served, Server

LEAST_TEXT = 20_000  # tokens of text to cut prompts from: places enough to begin at


def _positive(value: float | None) -> float | None:
    if value is not None and not value > 0:
        raise typer.BadParameter(f"it must be more than 0, not {value:g}")
    return value


def positive(*names: str, help: str) -> Any:
    """An option that takes a number above zero."""
    return option(*names, help=help, metavar="X", callback=_positive)


@dataclass(frozen=True, slots=True)
class Workload:
    """What is asked for."""

    arrivals: Annotated[
        Path | None,
        option(
            "--arrivals",
            "--dataset-path",
            help="Times and lengths from an Azure trace: TIMESTAMP,ContextTokens,GeneratedTokens.",
            metavar="CSV",
        ),
    ] = None
    time_scale: Annotated[
        float, positive("--time-scale", help="10: ten times slower than the trace.")
    ] = 1.0
    length_scale: Annotated[
        float, positive("--length-scale", help="0.1: a tenth of the trace's tokens.")
    ] = 1.0
    num_prompts: Annotated[
        int, option("--num-prompts", help="Requests, at most.", metavar="N", min=1)
    ] = 100
    random_input_len: Annotated[
        int, option("--random-input-len", help="Without a trace.", metavar="N", min=1)
    ] = 256
    random_output_len: Annotated[
        int, option("--random-output-len", help="Without a trace.", metavar="N", min=1)
    ] = 64
    random_range_ratio: Annotated[
        float,
        option(
            "--random-range-ratio",
            help="0.5: from half of these lengths to half as much again.",
            metavar="X",
            min=0.0,
            max=1.0,
        ),
    ] = 0.0
    request_rate: Annotated[
        float | None,
        positive(
            "--request-rate",
            help="Per second, or inf. Default: the trace's times; without a trace all at once.",
        ),
    ] = None
    burstiness: Annotated[
        float, positive("--burstiness", help="1 is Poisson; less comes in bursts.")
    ] = 1.0
    seed: Annotated[int, option("--seed", help="Of lengths, times and prompts.", metavar="N")] = 0

    def requests(self) -> list[Request]:
        random = Random(self.seed)
        if self.arrivals is not None:
            found = from_trace(self.arrivals, self.num_prompts, self.time_scale, self.length_scale)
        else:
            found = of_random_length(
                self.num_prompts,
                self.random_input_len,
                self.random_output_len,
                self.random_range_ratio,
                random,
            )
        if self.request_rate is None:
            return found
        return at_rate(found, self.request_rate, self.burstiness, random)

    def as_dict(self) -> dict[str, Any]:
        """What vLLM writes about it, and what scaled the trace."""
        rate = self.request_rate
        if rate is None and self.arrivals is None:
            rate = inf
        return {
            "num_prompts": self.num_prompts,
            "request_rate": "inf" if rate == inf else rate,
            "burstiness": self.burstiness,
            "arrivals": None if self.arrivals is None else self.arrivals.name,
            "time_scale": self.time_scale,
            "length_scale": self.length_scale,
            "seed": self.seed,
        }


@dataclass(frozen=True, slots=True)
class Asking:
    """Whom is asked, and how."""

    base_url: Annotated[
        str | None, option("--base-url", help="Default: of --host and --port.", metavar="URL")
    ] = None
    host: Annotated[str, option("--host", help="Of the server.", metavar="NAME")] = "127.0.0.1"
    port: Annotated[int, option("--port", help="Of the server.", metavar="N")] = 8000
    endpoint: Annotated[str, option("--endpoint", help="The completions API.", metavar="PATH")] = (
        "/v1/completions"
    )
    api_key: Annotated[
        str | None, option("--api-key", help="Sent as a bearer token.", metavar="KEY")
    ] = None
    model: Annotated[
        str | None, option("--model", help="Default: the first that is served.", metavar="NAME")
    ] = None
    tokenizer: Annotated[
        Path | None,
        option("--tokenizer", help="Default: the server's /tokenize.", metavar="FOLDER"),
    ] = None
    max_model_len: Annotated[
        int | None,
        option("--max-model-len", help="Default: what the server says.", metavar="N", min=2),
    ] = None
    text: Annotated[
        Path | None,
        option("--text", help="Prompts are cut from it; default: Python's docs.", metavar="FILE"),
    ] = None
    shuffle_tokens: Annotated[
        bool, option("--shuffle-tokens", help="Prompts without sense: they route like no text.")
    ] = False
    ignore_eos: Annotated[
        bool, option("--ignore-eos", help="Every answer gets the length that was asked for.")
    ] = False
    temperature: Annotated[
        float, option("--temperature", help="0 is greedy.", metavar="X", min=0.0)
    ] = 0.0
    max_concurrency: Annotated[
        int | None,
        option("--max-concurrency", help="Hold back what is more.", metavar="N", min=1),
    ] = None

    @property
    def url(self) -> str:
        return self.base_url or f"http://{self.host}:{self.port}"

    def body(self, served: Served, request: Request, prompts: Prompts) -> dict[str, Any]:
        body = {
            "model": served.name,
            "prompt": prompts.take(request.prompt_tokens),
            "max_tokens": request.output_tokens,
            "temperature": self.temperature,
        }
        return {**body, "ignore_eos": True} if self.ignore_eos else body


@takes_options(workload=Workload, asking=Asking)
def bench_serve(
    *,
    goodput: Annotated[
        list[str] | None,
        option(
            "--goodput",
            help="What a good answer keeps to: ttft:MS,tpot:MS,e2el:MS.",
            metavar="GOALS",
        ),
    ] = None,
    percentile_metrics: Annotated[
        str, option("--percentile-metrics", help="Which are shown.", metavar="A,B,C")
    ] = "ttft,tpot,itl,e2el",
    metric_percentiles: Annotated[
        str, option("--metric-percentiles", help="Which are shown.", metavar="P,Q")
    ] = "50,90,99",
    save_result: Annotated[
        bool, option("--save-result", help="Write the JSON to --result-filename.")
    ] = False,
    result_filename: Annotated[
        Path | None,
        option("--result-filename", help="Default: of model and time.", metavar="FILE"),
    ] = None,
    json: Json = False,
    workload: Workload,
    asking: Asking,
) -> None:
    """Measure a server under load.

    Prompts are real text. Requests go out at their times, whoever still waits (open loop). Options
    and the keys of --json are those of `vllm bench serve` where it has them.
    """
    from understudy.traffic.result import Wanted, figures, reasons

    wanted = Wanted.parse(percentile_metrics, metric_percentiles, goodput or ())
    served, clipped, replayed = asyncio.run(_replay(asking, workload))
    found = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": "openai",
        "model_id": served.name,
        **workload.as_dict(),
        "max_concurrency": asking.max_concurrency,
        "clipped": clipped,
        **figures(replayed.answers, replayed.seconds, wanted),
        "max_concurrent_requests": replayed.peak,
    }
    failures = reasons(replayed.answers)
    if not found["completed"]:
        raise UnderstudyError(f"all {found['failed']} requests failed; mostly: {failures[0][0]}")
    for reason, count in failures[:5]:
        screen.say(f"{count} failed: {reason}")
    _deliver(found, wanted.metrics, json)
    if save_result or result_filename:
        _save(found, result_filename)


async def _replay(asking: Asking, workload: Workload) -> tuple[Served, int, Replayed]:
    """The model, how many requests had to be clipped, and what came back."""
    from understudy.traffic import client

    requests = workload.requests()
    async with client.Server(asking.url, asking.endpoint, asking.api_key) as server:
        served = await server.model(asking.model)
        requests, clipped = _fitted(requests, asking.max_model_len or served.longest)
        longest = max(request.prompt_tokens for request in requests)
        ids = await _text(asking, server, served, max(LEAST_TEXT, longest))
        prompts = Prompts(ids, Random(workload.seed), asking.shuffle_tokens)
        await _try(server, asking.body(served, Request(0.0, 8, 1), prompts))
        planned = [(one.at, asking.body(served, one, prompts)) for one in requests]
        with screen.progress() as bar:
            label = f"{len(planned)} requests in {planned[-1][0]:.0f} s to {served.name}"
            replayed = await client.replay(server, planned, asking.max_concurrency, bar(label))
    return served, clipped, replayed


def _fitted(requests: list[Request], longest: int | None) -> tuple[list[Request], int]:
    if longest is None:
        screen.say("the server does not say its longest context: nothing is clipped")
        return requests, 0
    fitted, clipped = clip(requests, longest)
    if clipped:
        screen.say(f"{clipped} of {len(requests)} requests clipped to {longest} tokens")
    return fitted, clipped


async def _text(asking: Asking, server: Server, served: Served, wanted: int) -> list[int]:
    """Token ids of real text, as this model reads it."""
    from understudy import texts

    text = texts.python_docs() if asking.text is None else texts.read(asking.text)
    if asking.tokenizer is None:
        return await server.tokenize(served.name, text, wanted)
    from understudy.engine import tokenizer_in

    tokenizer = tokenizer_in(asking.tokenizer)
    cut = text[: 40 * wanted]
    return list(tokenizer(cut, add_special_tokens=False, verbose=False).input_ids)


async def _try(server: Server, body: dict[str, Any]) -> None:
    """One request that is not counted: it fails early, and lets a server do what it does once."""
    trial = Answer(late=0.0)
    await server.complete(body, trial)
    if trial.error:
        raise UnderstudyError(f"{server.completions}: {trial.error}")


# ------------------------------------------------------------------------------------- results


def _deliver(found: dict[str, Any], metrics: Sequence[str], json: bool) -> None:
    screen.show(summary(found), json_too=json)
    screen.show(latencies(found, metrics), json_too=json)
    if json:
        screen.write_json(found)


def summary(found: dict[str, Any]) -> Table:
    good = found["request_goodput"]
    return screen.facts(
        {
            "requests": f"{found['completed']} completed, {found['failed']} failed, "
            f"{found['clipped']} clipped, {found['late_sends']} sent late "
            f"(at most {found['max_late_ms']:.0f} ms)",
            "duration": f"{found['duration']:.1f} s, at most "
            f"{found['max_concurrent_requests']} requests at a time",
            "tokens": f"{found['total_input_tokens']} read, {found['total_output_tokens']} written",
            "throughput": f"{found['request_throughput']:.2f} requests/s, "
            f"{found['output_throughput']:.1f} tokens/s written, "
            f"{found['total_token_throughput']:.1f} in all",
            **({} if good is None else {"goodput": f"{good:.2f} requests/s"}),
        },
        title=f"{found['model_id']} under load",
    )


def latencies(found: dict[str, Any], metrics: Sequence[str]) -> Table:
    """One line per metric, one column per statistic, in milliseconds."""
    statistics = [
        key.removesuffix(f"_{metrics[0]}_ms") for key in found if key.endswith(f"_{metrics[0]}_ms")
    ] if metrics else []  # fmt: skip
    table = screen.grid("ms", *statistics)
    for metric in metrics:
        table.add_row(metric, *(f"{found[f'{name}_{metric}_ms']:.1f}" for name in statistics))
    return table


def _save(found: dict[str, Any], path: Path | None) -> None:
    if path is None:
        name = str(found["model_id"]).rstrip("/").split("/")[-1]
        path = Path(f"openai-{name}-{found['date']}.json")
    try:
        path.write_text(json_module.dumps(found) + "\n", encoding="utf-8")
    except OSError as e:
        raise UnderstudyError(f"cannot write {path}: {e.strerror}; name another file") from e
    screen.say(f"written: {path}")
