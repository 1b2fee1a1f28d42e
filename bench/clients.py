"""Clients of a server under load: well-behaved ones, careless ones, and those who hang up.

Knows: OpenAI's API, what every answer must be. Does not know: processes, memory, what is reported.

A job is a greedy request whose answer was first asked for alone. Every completed answer to it later
must be the same text; where it is not, the alone answer's logprobs say how close the decision was.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import httpx2

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"

# Shares of what a client does next; what is left of 1 is a sampled answer, which only has to come.
GREEDY, HANGS_UP, MALFORMED = 0.70, 0.10, 0.05


@dataclass(frozen=True, slots=True)
class Job:
    """``body``: without stream. ``text``: the answer given alone; per token its text and how much
    likelier it was than the next one (natural logarithm)."""

    path: str
    body: dict[str, Any]
    text: str = ""
    tokens: tuple[str, ...] = ()
    gaps: tuple[float, ...] = ()

    def gap_at(self, character: int) -> float | None:
        """How close the decision was that this character of the text hung on."""
        end = 0
        for token, gap in zip(self.tokens, self.gaps, strict=True):
            end += len(token)
            if end > character:
                return gap
        return self.gaps[-1] if self.gaps else None


def jobs(ids: Sequence[int], texts: Sequence[str], longest: int, random: Random) -> list[Job]:
    """Mixed lengths: from a few tokens to what fits, as completions and as chats."""
    found = []
    for text in texts:
        new = random.choice([1, 4, 16, 48, 96])
        read = min(longest - new, random.choice([4, 20, 60, 150, 400, 800]))
        start = random.randrange(max(1, len(ids) - read))
        common = {"temperature": 0.0, "max_tokens": new}
        found.append(Job(COMPLETIONS, {**common, "prompt": list(ids[start : start + read])}))
        found.append(Job(CHAT, {**common, "messages": [{"role": "user", "content": text}]}))
    return found


MALFORMED_BODIES: tuple[tuple[str, str | dict[str, Any]], ...] = (
    (COMPLETIONS, "{not json"),
    (COMPLETIONS, "[]"),
    (COMPLETIONS, {}),
    (COMPLETIONS, {"prompt": "x", "max_tokens": "many"}),
    (COMPLETIONS, {"prompt": "x", "max_tokens": -1}),
    (COMPLETIONS, {"prompt": "x", "max_tokens": 1 << 40}),
    (COMPLETIONS, {"prompt": [1 << 40], "max_tokens": 1}),
    (COMPLETIONS, {"prompt": [1] * 100_000, "max_tokens": 1}),
    (COMPLETIONS, {"prompt": "x", "temperature": -1}),
    (COMPLETIONS, {"prompt": "x", "n": 100_000}),
    (COMPLETIONS, {"prompt": "x", "stop": ["y"] * 1000}),
    (COMPLETIONS, {"prompt": "x", "nonsense": 1}),
    (COMPLETIONS, {"prompt": "x", "model": "another"}),
    (CHAT, {"messages": []}),
    (CHAT, {"messages": [{"role": "nobody", "content": "x"}]}),
    (CHAT, {"messages": [{"role": "user", "content": "x"}], "top_logprobs": 1000}),
    ("/v1/nowhere", {}),
)


@dataclass(slots=True)
class Outcome:
    """What happened to all clients together. ``wrong``: what must never happen, in words."""

    counts: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    wrong: list[str] = field(default_factory=list)
    mismatches: list[dict[str, Any]] = field(default_factory=list)


class Wrong(Exception):
    """The server did what it must not do."""


class Clients:
    """All clients of one server, over one pool of connections."""

    def __init__(self, http: httpx2.AsyncClient, jobs: Sequence[Job], seed: int) -> None:
        self._http, self._jobs, self._seed = http, jobs, seed
        self.outcome = Outcome()

    async def live(self, count: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for number in range(count):
                group.create_task(self._live(Random(f"{self._seed} {number}"), end))

    async def _live(self, random: Random, end: float) -> None:
        while time.monotonic() < end:
            name, act = self._next(random)
            try:
                await act(random)
            except (Wrong, httpx2.HTTPError) as e:
                self.outcome.wrong.append(f"{name}: {e or type(e).__name__}"[:300])
            else:
                self.outcome.counts[name] += 1

    def _next(self, random: Random) -> tuple[str, Callable[[Random], Any]]:
        draw = random.random()
        for share, name, act in (
            (GREEDY, "greedy", self._greedy),
            (HANGS_UP, "hung up", self._hang_up),
            (MALFORMED, "malformed", self._malformed),
        ):
            if draw < share:
                return name, act
            draw -= share
        return "sampled", self._sampled

    # ------------------------------------------------------------------------- what clients do

    async def _greedy(self, random: Random) -> None:
        job, stream = random.choice(self._jobs), random.random() < 0.5
        text = await self._whole(job.path, job.body, stream)
        if text != job.text:
            self.outcome.mismatches.append(_mismatch(job, text, stream))

    async def _sampled(self, random: Random) -> None:
        job = random.choice(self._jobs)
        body = {**job.body, "temperature": 1.0, "seed": random.randrange(1 << 31)}
        await self._whole(job.path, body, random.random() < 0.5)

    async def _whole(self, path: str, body: dict[str, Any], stream: bool) -> str:
        """The text of an answer that must come."""
        if stream:
            return await self._streamed(path, body)
        response = await self._http.post(path, json=body)
        if response.status_code != 200:
            raise Wrong(f"status {response.status_code}: {response.text[:200]}")
        answer = response.json()
        self.outcome.tokens += answer["usage"]["completion_tokens"]
        return finished(answer["choices"][0])

    async def _streamed(self, path: str, body: dict[str, Any]) -> str:
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        parts: list[str] = []
        reason = last = None
        async with self._http.stream("POST", path, json=asked) as response:
            if response.status_code != 200:
                raise Wrong(f"status {response.status_code}: {(await response.aread())[:200]!r}")
            async for event in httpx2.EventSource(response):
                last = event.data
                if last == "[DONE]":
                    break
                chunk = json.loads(last)
                if "error" in chunk:
                    raise Wrong(f"an error in the stream: {chunk['error']}")
                for choice in chunk["choices"]:
                    parts.append(said(choice))
                    reason = choice.get("finish_reason") or reason
                if chunk.get("usage"):
                    self.outcome.tokens += chunk["usage"]["completion_tokens"]
        if last != "[DONE]":
            raise Wrong("a stream without its end")
        return finished({"text": "".join(parts), "finish_reason": reason})

    async def _hang_up(self, random: Random) -> None:
        """In the middle of a stream, or while waiting for a whole answer."""
        job = random.choice(self._jobs)
        patience = random.expovariate(2.0)
        try:
            async with asyncio.timeout(patience):
                if random.random() < 0.5:
                    await self._http.post(job.path, json=job.body)
                    return
                asked = {**job.body, "stream": True}
                async with self._http.stream("POST", job.path, json=asked) as response:
                    async for _ in httpx2.EventSource(response):
                        if random.random() < 0.1:
                            return
        except TimeoutError:
            return

    async def _malformed(self, random: Random) -> None:
        path, body = random.choice(MALFORMED_BODIES)
        content = body if isinstance(body, str) else json.dumps(body)
        headers = {"Content-Type": "application/json"}
        response = await self._http.post(path, content=content, headers=headers)
        if not 400 <= response.status_code < 500:
            raise Wrong(f"{path} {content[:80]}: status {response.status_code}")
        if not response.json()["error"]["message"]:
            raise Wrong(f"{path} {content[:80]}: an error without a message")

    # ------------------------------------------------------------------------------- alone

    async def ask_alone(self, job: Job) -> Job:
        """The job with its answer, while nobody else asks. The answer without logprobs, too."""
        chat = job.path == CHAT
        wanted = {"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}
        response = await self._http.post(job.path, json={**job.body, **wanted})
        if response.status_code != 200:
            raise Wrong(f"alone: status {response.status_code}: {response.text[:200]}")
        (choice,) = response.json()["choices"]
        told = choice["logprobs"]
        if chat:
            tokens = [one["token"] for one in told["content"]]
            tops = [[top["logprob"] for top in one["top_logprobs"]] for one in told["content"]]
        else:
            tokens, tops = told["tokens"], [list(top.values()) for top in told["top_logprobs"]]
        found = Job(job.path, job.body, finished(choice), tuple(tokens), tuple(map(_gap, tops)))
        again = await self._whole(job.path, job.body, stream=False)
        if again != found.text:
            raise Wrong("alone, the same greedy request has two answers")
        return found


def said(choice: dict[str, Any]) -> str:
    """The text of a choice, whole or in a stream, of either API."""
    if "text" in choice:
        return str(choice["text"])
    return (choice.get("delta") or choice.get("message") or {}).get("content") or ""


def finished(choice: dict[str, Any]) -> str:
    """The text of an answer that says that it has ended."""
    if choice["finish_reason"] not in ("stop", "length"):
        raise Wrong(f"an answer that ended with {choice['finish_reason']!r}")
    return said(choice)


def _gap(logprobs: Sequence[float]) -> float:
    best, second = sorted(logprobs, reverse=True)[:2] if len(logprobs) > 1 else (0.0, float("-inf"))
    return best - second


def _mismatch(job: Job, text: str, stream: bool) -> dict[str, Any]:
    same = next((i for i, (a, b) in enumerate(zip(job.text, text, strict=False)) if a != b), None)
    place = min(len(job.text), len(text)) if same is None else same
    return {
        "path": job.path,
        "stream": stream,
        "max_tokens": job.body["max_tokens"],
        "first_different_character": place,
        "gap": job.gap_at(place),
        "alone": job.text[max(0, place - 20) : place + 20],
        "in_company": text[max(0, place - 20) : place + 20],
    }
