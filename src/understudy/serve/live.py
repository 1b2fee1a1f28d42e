"""What the page sees: facts about the model, a live picture four times a second, layers in numbers.

Knows: FastAPI, the engine's snapshot, `CacheView`. Does not know: how the page shows it.

One picture is taken for all who watch, on a thread of its own, and none while nobody does. A slow
watcher misses pictures; it never gets old ones, and nothing piles up for it.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from understudy.batch import Ask, Busy, Report, Snapshot, StepReport
from understudy.core import Counters
from understudy.model import experts_per_token
from understudy.serve.cache_view import RESIDENT, CacheView
from understudy.serve.served import Batch

PERIOD = 0.25  # seconds between pictures
MOST_WATCHERS = 16
HOTTEST = 63  # six bits of a cell; the other two are its state
LEVELS_PER_DOUBLING = 5  # of the uses; 63 are some 6,000 uses


class Live:
    """An `Observer` of ``batch`` that shows it to whoever watches."""

    def __init__(
        self, batch: Batch, model_name: str, *, period: float = PERIOD, most: int = MOST_WATCHERS
    ) -> None:
        self._batch, self._model, self._period, self._most = batch, model_name, period, most
        self._cache = CacheView(batch.engine)
        self._tokens = Tokens()
        self._watchers = 0
        self._taking: asyncio.Task[None] | None = None
        self._news = asyncio.Condition()
        self._picture = b""  # the newest
        self._over = False  # there will be no more
        self._closed = False

    # ------------------------------------------------------------------ told on the engine's thread

    def on_step(self, step: StepReport) -> None:
        self._tokens = self._tokens.after(step)

    def on_token(self, seconds: float) -> None:
        """Steps say enough."""

    def on_finish(self, ask: Ask, finish: str, report: Report) -> None:
        """Steps say enough."""

    # ------------------------------------------------------------------------------ what can be had

    def layers(self) -> list[dict[str, int | str]]:
        """Lookups and residents of each layer."""
        return self._cache.by_layer()

    def facts(self) -> dict[str, Any]:
        """What does not change while the server runs, and which policies are on."""
        cache = self._cache
        return {
            "model": self._model,
            "version": version("understudy"),
            "context": self._batch.context,
            "layers": [{"name": m.name, "experts": m.num_experts} for m in cache.modules],
            "experts_per_token": experts_per_token(self._batch.engine.checkpoint.config),
            "tiers": {"slow": cache.slow.value, "fast": cache.fast.value},
            "plan": cache.plan.as_dict(),
            "policies": cache.policies,
        }

    def close(self) -> None:
        """Send everybody away with the next picture: the server stops."""
        self._closed = True

    # ---------------------------------------------------------------------------------- who watches

    @contextmanager
    def seat(self) -> Iterator[None]:
        """One more watches. Raises `Busy` where all seats are taken."""
        if self._watchers >= self._most:
            raise Busy(f"{self._most} pages watch already; close one", retry_after=5.0)
        self._watchers += 1
        if self._taking is None or self._taking.done():
            self._over = False
            self._taking = asyncio.create_task(self._take_pictures())
        try:
            yield
        finally:
            self._watchers -= 1
            if self._watchers == 0:
                self._taking.cancel()
                self._taking = None

    async def pictures(self) -> AsyncIterator[bytes]:
        """As they are taken, until the server drains. From a seat."""
        shown = self._picture
        while not self._over:
            async with self._news:
                await self._news.wait()
            if self._picture is not shown:
                shown = self._picture
                yield shown

    async def _take_pictures(self) -> None:
        """The last one of a server that drains says so."""
        try:
            with closing(Camera(self._batch, self._cache, lambda: self._tokens)) as camera:
                while not (self._closed or camera.draining):
                    await asyncio.sleep(self._period)
                    picture = await asyncio.to_thread(camera.picture)
                    text = json.dumps(picture, separators=(",", ":"))
                    self._picture = f"data: {text}\n\n".encode()
                    await self._tell()
        finally:
            if asyncio.current_task() is self._taking:  # else nobody watches, or others by now
                self._over = True
                await self._tell()

    async def _tell(self) -> None:
        async with self._news:
            self._news.notify_all()


def routes(find: Callable[[], Live]) -> APIRouter:
    """The addresses under ``/understudy``; ``live`` answers with server-sent events. ``find``:
    called for each request; raises what a client is to be told while there is no model."""
    router = APIRouter(prefix="/understudy", tags=["understudy"])

    @router.get("/model")
    async def model() -> JSONResponse:
        """The model, its budget and its policies."""
        return JSONResponse(find().facts())

    @router.get("/layers")
    async def layers() -> JSONResponse:
        """Lookups and residents of each layer; the sum over layers is what `/metrics` says."""
        return JSONResponse({"layers": find().layers()})

    # Not in the schema: whoever tries every address there would watch for ever.
    @router.get("/live", include_in_schema=False)
    async def live() -> Response:
        return _Pictures(find())

    return router


class _Pictures(StreamingResponse):
    """The stream of one watcher, who takes a seat when it begins."""

    media_type = "text/event-stream"

    def __init__(self, live: Live) -> None:
        super().__init__(
            live.pictures(), headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        self._live = live

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._live.seat():
            await super().__call__(scope, receive, send)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens worked on since the start. Replaced as a whole, so it is read whole on any thread."""

    prompts: int = 0
    answers: int = 0

    def after(self, step: StepReport) -> Tokens:
        return Tokens(self.prompts + step.prompt_tokens, self.answers + step.new_tokens)


class Camera:
    """Takes pictures: what is now, and what happened since the picture before."""

    def __init__(self, batch: Batch, cache: CacheView, tokens: Callable[[], Tokens]) -> None:
        self._batch, self._cache, self._read_tokens = batch, cache, tokens
        self._heat = cache.start_heat()
        self._last: tuple[float, Counters, Tokens] = self._look(batch.snapshot())
        self.draining = False

    def close(self) -> None:
        self._cache.stop_heat(self._heat)

    def _look(self, snapshot: Snapshot) -> tuple[float, Counters, Tokens]:
        return time.monotonic(), snapshot.counters, self._read_tokens()

    def picture(self) -> dict[str, Any]:
        now = self._batch.snapshot()
        then, before, earlier = self._last
        self._last = moment, counters, tokens = self._look(now)
        self.draining = now.draining
        return {
            "seconds": round(moment - then, 4),
            "alive": now.alive,
            "draining": now.draining,
            "running": now.running,
            "waiting": now.waiting,
            "kv_used": now.kv_used,
            "kv_total": now.kv_total,
            "prompt_tokens": tokens.prompts - earlier.prompts,
            "new_tokens": tokens.answers - earlier.answers,
            "speculating": self._cache.speculating,
            "layers": self._cache.lookups(),
            **_since(counters - before),
            **self._cells(moment - then),
        }

    def _cells(self, seconds: float) -> dict[str, Any]:
        """One byte per expert, layer by layer: state * 64 + heat, that in logarithms."""
        states = self._cache.states()
        levels = LEVELS_PER_DOUBLING * np.log2(1 + self._heat.after(seconds))
        cells = states * 64 + np.minimum(levels, HOTTEST).astype(np.uint8)
        return {
            "resident": int((states == RESIDENT).sum()),
            "cells": base64.b64encode(cells.tobytes()).decode("ascii"),
        }


def _since(c: Counters) -> dict[str, float]:
    return {
        "hits": c.hits,
        "late": c.late,
        "misses": c.misses,
        "prefetch_issued": c.prefetch_issued,
        "prefetch_used": c.prefetch_used,
        "prefetch_wasted": c.prefetch_wasted,
        "demand_bytes": c.demand_bytes,
        "prefetch_bytes": c.prefetch_bytes,
        "stall_seconds": round(c.stall_seconds, 6),
    }
