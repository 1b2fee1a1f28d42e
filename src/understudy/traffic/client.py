"""Sends requests to an OpenAI-compatible server at their times and watches the answers stream.

Knows: HTTP, the completions API, server-sent events, one monotonic clock. Does not know: where
requests come from, what is made of the answers.

Open loop: a request goes out at its time whoever is still waiting, unless ``max_concurrency`` holds
it back. How much later than planned it went is kept in its `Answer`.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import httpx2

from understudy.core import UnderstudyError
from understudy.traffic import Answer

# Between two signs of life of an answer; a prompt may be long and the server a laptop.
PATIENCE_SECONDS = 600.0
PIECE_CHARS = 8000  # of text per call of /tokenize

Report = Callable[[int, int], None]  # (done, in all)


@dataclass(frozen=True, slots=True)
class Served:
    """A model as the server lists it. ``longest``: tokens of prompt and answer, where it says."""

    name: str
    longest: int | None


@dataclass(slots=True)
class Replayed:
    """``seconds``: from the start to the last answer; ``peak``: most requests at one time."""

    answers: list[Answer]
    seconds: float
    peak: int


class Server:
    """One server. An async context manager."""

    def __init__(
        self,
        base_url: str,
        endpoint: str = "/v1/completions",
        api_key: str | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        if endpoint.rstrip("/").endswith("chat/completions"):
            raise UnderstudyError(
                "prompts are sent as token ids, which the chat API does not take; "
                "use --endpoint /v1/completions"
            )
        self.base_url = base_url.rstrip("/")
        self.completions = self.base_url + endpoint
        self._http = httpx2.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
            timeout=httpx2.Timeout(PATIENCE_SECONDS, connect=30.0),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
            transport=transport,
            trust_env=False,  # a proxy would be measured along with the server
        )

    async def __aenter__(self) -> Server:
        await self._http.__aenter__()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        await self._http.__aexit__(*exc)

    async def model(self, name: str | None = None) -> Served:
        """The model of this name; without one, the first that is served."""
        listed = (await self._told("GET", "/v1/models")).get("data") or []
        chosen = [one for one in listed if name in (None, one.get("id"))]
        if not chosen:
            known = ", ".join(str(one.get("id")) for one in listed) or "nothing"
            raise UnderstudyError(
                f"{self.base_url} serves {known}, not {name}; try another --model"
            )
        return Served(str(chosen[0]["id"]), chosen[0].get("max_model_len"))

    async def tokenize(self, model: str, text: str, wanted: int) -> list[int]:
        """At least ``wanted`` tokens of ``text``, or all there are, as the server counts them."""
        ids: list[int] = []
        for start in range(0, len(text), PIECE_CHARS):
            piece = text[start : start + PIECE_CHARS]
            asked = {"model": model, "prompt": piece, "add_special_tokens": False}
            ids += (await self._told("POST", "/tokenize", asked))["tokens"]
            if len(ids) >= wanted:
                break
        return ids

    async def _told(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        """One small question and its answer; all that may go wrong is one line."""
        try:
            response = await self._http.request(method, self.base_url + path, json=body)
        except httpx2.HTTPError as e:
            raise UnderstudyError(
                f"no server answers at {self.base_url} ({_cause(e)}); start one or try another "
                "--base-url"
            ) from e
        if response.status_code == 404 and path == "/tokenize":
            raise UnderstudyError(f"{self.base_url} has no /tokenize; name a --tokenizer")
        if response.status_code != 200:
            raise UnderstudyError(f"{self.base_url}{path}: {_refusal(response)}")
        try:
            found: dict[str, Any] = response.json()
        except ValueError as e:
            raise UnderstudyError(f"{self.base_url}{path} answers with no JSON") from e
        return found

    async def complete(self, body: dict[str, Any], answer: Answer) -> None:
        """Ask, and write into ``answer`` what comes and when."""
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        stream = _Stream(answer)
        try:
            async with self._http.stream("POST", self.completions, json=asked) as got:
                if got.status_code != 200:
                    await got.aread()
                    answer.error = _refusal(got)
                    return
                async for event in httpx2.EventSource(got):
                    if stream.take(event.data):
                        break
            answer.error = stream.complaint()
        except httpx2.HTTPError as e:
            answer.error = _cause(e)


class _Stream:
    """One streamed answer as it comes in. Its clock starts here."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._sent = time.perf_counter()
        self._error: str | None = None
        self._finished = self._counted = False

    def take(self, data: str) -> bool:
        """One event. True: it was the last."""
        now = time.perf_counter() - self._sent
        if data == "[DONE]":
            return True
        try:
            chunk = json.loads(data)
        except ValueError:
            chunk = {"error": "an event that is no JSON"}
        if "error" in chunk:
            error = chunk["error"]
            self._error = str(error.get("message") if isinstance(error, dict) else error)
            return True
        for choice in chunk.get("choices") or ():
            self._take_choice(choice, now)
        if usage := chunk.get("usage"):
            self._counted = True
            self._answer.prompt_tokens = int(usage["prompt_tokens"])
            self._answer.output_tokens = int(usage["completion_tokens"])
        return False

    def _take_choice(self, choice: dict[str, Any], now: float) -> None:
        answer = self._answer
        if choice.get("text"):
            if answer.ttft:
                answer.gaps.append(now - answer.e2e)
            else:
                answer.ttft = now
            answer.e2e = now
        if choice.get("finish_reason"):
            self._finished = True
            answer.e2e = now

    def complaint(self) -> str | None:
        """Why this answer does not count, if it does not."""
        if self._error is not None:
            return self._error
        if not self._finished:
            return "the stream ended before the answer did"
        if not self._counted:
            return "no usage in the stream: the server ignores stream_options.include_usage"
        if not self._answer.ttft:  # every token was without text
            self._answer.ttft = self._answer.e2e
        return None


def _refusal(response: httpx2.Response) -> str:
    """Status and message of an error in OpenAI's envelope, or in any other."""
    try:
        told = response.json()["error"]
        reason = str(told["message"] if isinstance(told, dict) else told)
    except (ValueError, KeyError, TypeError):
        reason = response.text
    return f"{response.status_code} {' '.join(reason.split())[:200]}".rstrip()


def _cause(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


async def replay(
    server: Server,
    planned: Sequence[tuple[float, dict[str, Any]]],
    max_concurrency: int | None = None,
    report: Report = lambda done, total: None,
) -> Replayed:
    """Send each body at its time (seconds from now on), earliest first, and await every answer."""
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency else nullcontext()
    answers: list[Answer] = []
    running = peak = done = 0
    started = time.perf_counter()

    async def ask(at: float, body: dict[str, Any], answer: Answer) -> None:
        nonlocal running, peak, done
        async with gate:
            answer.late = max(0.0, time.perf_counter() - started - at)
            running += 1
            peak = max(peak, running)
            await server.complete(body, answer)
            running -= 1
        done += 1
        report(done, len(planned))

    async with asyncio.TaskGroup() as group:
        for at, body in planned:
            await asyncio.sleep(max(0.0, started + at - time.perf_counter()))
            answers.append(Answer(late=0.0))
            group.create_task(ask(at, body, answers[-1]))
    return Replayed(answers, time.perf_counter() - started, peak)
