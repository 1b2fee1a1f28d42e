"""Does the server stay up, stay small and stay right under many clients, some of them careless?

    python bench/load.py [--model models/fine] [--clients 64] [--minutes 10 | --seconds 20]
                         [--memory 256MiB] [--slots 50%] [--seed 0] [--json]

Starts ``understudy serve`` in float32 as a process of its own. First every greedy request is asked
alone; then all clients at once ask greedy and sampled answers of mixed lengths, streamed or whole,
5 % of their requests are malformed, 10 % hang up. Checked:

    errors       nothing but what the client itself caused, and that with 4xx
    equal        every completed greedy answer is the answer given alone (float32; where one is not,
                 the last line says how close its decision was)
    flat         resident memory grows by at most 3 % from after the warm-up to the end
    afterwards   nobody is left running, the answers are still the same, SIGTERM ends it with 0

The last line is JSON. Exit code 1: a check failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import httpx2

from bench import card as cards
from bench import show
from bench.clients import Clients, Job, Outcome, Wrong, jobs
from bench.served import Memory, Served
from understudy import texts
from understudy.core import UnderstudyError

FLAT = 0.03  # growth of resident memory that is called flat
DISTINCT = 24  # texts, each asked as a completion and as a chat


async def run(server: Served, options: argparse.Namespace) -> tuple[Outcome, Memory, float]:
    """The outcome, the memory, and for how long."""
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=options.clients)
    timeout = httpx2.Timeout(300.0)
    async with httpx2.AsyncClient(
        base_url=server.url, limits=limits, timeout=timeout, trust_env=False
    ) as http:
        asked = await _asked(http, options.seed)
        alone = Clients(http, (), options.seed)
        known: list[Job] = []
        report = show.progress(f"{len(asked)} requests alone")
        for job in asked:
            known.append(await alone.ask_alone(job))
            report(len(known), len(asked))
        clients, memory = Clients(http, known, options.seed), Memory()
        watching = asyncio.create_task(memory.watch(server))
        began = time.monotonic()
        show.say(f"{options.clients} clients for {options.seconds:.0f} s")
        await clients.live(options.clients, options.seconds)
        seconds = time.monotonic() - began
        watching.cancel()
        await _afterwards(http, clients, known)
    return clients.outcome, memory, seconds


async def _asked(http: httpx2.AsyncClient, seed: int) -> list[Job]:
    """The jobs, as long as this model's context allows."""
    random, text = Random(seed), texts.python_docs()
    listed = (await http.get("/v1/models")).json()
    longest = int(listed["data"][0]["max_model_len"])
    start = random.randrange(len(text) - 40_000)
    told = await http.post("/tokenize", json={"prompt": text[start : start + 20_000]})
    starts = [random.randrange(len(text) - 1000) for _ in range(DISTINCT)]
    pieces = [text[at : at + random.choice([20, 100, 400])] for at in starts]
    return jobs(told.json()["tokens"], pieces, longest, random)


async def _afterwards(http: httpx2.AsyncClient, clients: Clients, known: Sequence[Job]) -> None:
    """Alone again: the answers must be those from before, and nothing may be left over."""
    wrong = clients.outcome.wrong
    for job in known[:8]:
        try:
            if (await clients.ask_alone(job)).text != job.text:
                wrong.append("afterwards: an answer given alone is not the one from before")
        except (Wrong, httpx2.HTTPError) as e:
            wrong.append(f"afterwards: {e}")
    health = await http.get("/health")
    if health.status_code != 200:
        wrong.append(f"afterwards: /health says {health.status_code}")
    metrics = await http.get("/metrics")
    for line in metrics.text.splitlines() if metrics.status_code == 200 else ():
        name, _, value = line.rpartition(" ")
        if "num_requests_running" in name and name[0] != "#" and float(value):
            wrong.append(f"afterwards: {line}")


def checks(outcome: Outcome, memory: dict[str, Any], exit_code: int) -> dict[str, bool]:
    return {
        "errors": not outcome.wrong,
        "equal": not outcome.mismatches,
        "flat": memory["growth"] <= FLAT,
        "afterwards": exit_code == 0,
    }


def row(
    outcome: Outcome, memory: Memory, seconds: float, exit_code: int, options: argparse.Namespace
) -> dict[str, Any]:
    remembered = memory.summary()
    return {
        "model": options.model.name,
        "clients": options.clients,
        "seconds": round(seconds, 1),
        "counts": dict(outcome.counts),
        "requests": sum(outcome.counts.values()) + len(outcome.wrong),
        "tokens": outcome.tokens,
        "tokens_per_second": round(outcome.tokens / seconds, 1),
        "wrong": len(outcome.wrong),
        "first_wrong": outcome.wrong[:20],
        "mismatches": len(outcome.mismatches),
        "largest_gap_of_a_mismatch": max((m["gap"] or 0 for m in outcome.mismatches), default=None),
        "first_mismatches": outcome.mismatches[:20],
        "memory": remembered,
        "exit_code": exit_code,
        "checks": checks(outcome, remembered, exit_code),
    }


def tell(found: dict[str, Any]) -> None:
    """For people."""
    memory, counts = found["memory"], found["counts"]
    print(
        f"{found['requests']} requests in {found['seconds']:.0f} s by {found['clients']} clients: "
        + ", ".join(f"{counts[name]} {name}" for name in sorted(counts))
        + f"; {found['tokens_per_second']:.0f} tokens/s"
    )
    print(
        f"resident {show.size(memory['first_bytes'])} -> {show.size(memory['last_bytes'])} "
        f"({100 * memory['growth']:+.1f} %), slope "
        f"{memory['slope_bytes_per_hour'] / (1 << 20):+.1f} MiB/hour"
    )
    for line in found["first_wrong"]:
        print(f"wrong: {line}")
    for one in found["first_mismatches"]:
        print(f"not as alone, decided by {one['gap']}: {one['alone']!r} | {one['in_company']!r}")
    for name, holds in found["checks"].items():
        print(f"{name:12} {'holds' if holds else 'FAILS'}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/fine"), help="(%(default)s)")
    parser.add_argument("--clients", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="(%(default)s)")
    parser.add_argument("--seconds", type=float, help="instead of minutes")
    parser.add_argument("--memory", default="256MiB", help="of the server (%(default)s)")
    parser.add_argument("--slots", default="50%", help="experts that it holds (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    parser.add_argument("--log", type=Path, help="keep what the server says there")
    parser.add_argument("--output", type=Path, help="write the JSON there, too")
    options = parser.parse_args()
    options.seconds = options.seconds or 60 * options.minutes
    return options


def main() -> int:
    options = arguments()
    try:
        note = (
            f"{options.clients} clients for {options.seconds:.0f} s; server: float32, --memory "
            f"{options.memory}, --slots {options.slots}; seed {options.seed}"
        )
        card = cards.card({options.model.name: options.model}, note)
        cards.show(card)
        with Served(
            options.model, "--memory", options.memory, "--slots", options.slots,
            "--dtype", "float32", "--disable-access-log", log=options.log,
        ) as server:  # fmt: skip
            show.say(f"ready after {server.wait_until_ready():.1f} s")
            outcome, memory, seconds = asyncio.run(run(server, options))
            server.terminate()
            found = row(outcome, memory, seconds, server.wait(), options)
            if outcome.wrong:
                show.say(server.said)
    except (UnderstudyError, Wrong) as error:
        show.say(f"error: {error}")
        return 2
    if not options.json:
        tell(found)
    last = json.dumps({"rows": [found], "card": card})
    if options.output:
        options.output.write_text(last + "\n", encoding="utf-8")
    print(last)
    return 0 if all(found["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
