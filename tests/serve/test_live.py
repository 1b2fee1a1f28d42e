"""What the page is told: pictures for those who watch, and nothing done while nobody does."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI
from fastapi.testclient import TestClient
from serve.pretended import SLOT_BYTES, PretendedBatch, a_step

from understudy.batch import Busy
from understudy.core import ExpertId
from understudy.serve import live as live_module
from understudy.serve.cache_view import ABSENT, LOADING, RESIDENT, CacheView
from understudy.serve.live import Camera, Live, Tokens

PERIOD = 0.005
LAYERS, EXPERTS = 3, 8


@pytest.fixture
def batch() -> PretendedBatch:
    return PretendedBatch(LAYERS, EXPERTS, slots=10)


@pytest.fixture
def live(batch: PretendedBatch) -> Live:
    return Live(batch, "tiny", period=PERIOD, most=2)


def cells(picture: dict[str, Any]) -> list[tuple[int, int]]:
    """(state, heat) of every cell."""
    return [divmod(byte, 64) for byte in base64.b64decode(picture["cells"])]


async def first(pictures: AsyncIterator[bytes], count: int) -> list[dict[str, Any]]:
    found = []
    async with asyncio.timeout(5):
        async for picture in pictures:
            text = picture.decode()
            assert text.startswith("data: ") and text.endswith("\n\n")
            found.append(json.loads(text[6:]))
            if len(found) == count:
                break
    return found


# -------------------------------------------------------------------------------------- one picture


def test_a_picture_shows_who_is_where_and_who_is_used(batch: PretendedBatch) -> None:
    camera = Camera(batch, CacheView(batch.engine), Tokens)
    batch.event(1, [2, 5], [2, 6])
    batch.director.book.reserve(ExpertId(2, 7))
    seen = cells(camera.picture())
    states = {place: state for place, (state, _) in enumerate(seen) if state != ABSENT}
    at = {(1, 2): RESIDENT, (1, 5): RESIDENT, (1, 6): RESIDENT, (2, 7): LOADING}
    assert states == {layer * EXPERTS + e: state for (layer, e), state in at.items()}
    heat = [heat for _, heat in seen]
    assert heat[EXPERTS + 2] > heat[EXPERTS + 5] == heat[EXPERTS + 6] > 0
    assert sum(level > 0 for level in heat) == 3
    camera.close()


def test_heat_fades(batch: PretendedBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    heat = CacheView(batch.engine).start_heat()
    batch.event(0, *[[1]] * 100)
    assert heat.after(0.1)[1] == 100
    assert heat.after(2.0)[1] == 50
    assert heat.after(20.0)[1] < 0.1


def test_a_picture_tells_what_happened_since_the_one_before(batch: PretendedBatch) -> None:
    tokens = Tokens()
    camera = Camera(batch, CacheView(batch.engine), lambda: tokens)
    batch.event(0, [1, 2])
    tokens = tokens.after(a_step(prompt_tokens=7, new_tokens=2))
    picture = camera.picture()
    assert (picture["hits"], picture["misses"], picture["demand_bytes"]) == (0, 2, 2000)
    assert (picture["prompt_tokens"], picture["new_tokens"]) == (7, 2)
    batch.event(0, [1, 2])
    picture = camera.picture()
    assert (picture["hits"], picture["misses"], picture["new_tokens"]) == (2, 0, 0)
    assert picture["layers"] == [(2, 0, 2), (0, 0, 0), (0, 0, 0)]
    assert (picture["kv_used"], picture["kv_total"], picture["resident"]) == (32, 128, 2)
    camera.close()


def test_many_uses_stay_within_a_byte(batch: PretendedBatch) -> None:
    camera = Camera(batch, CacheView(batch.engine), Tokens)
    batch.event(0, *[[1]] * 100_000)
    assert cells(camera.picture())[1] == (RESIDENT, 63)
    camera.close()


def test_a_later_camera_keeps_its_heat(batch: PretendedBatch) -> None:
    cache = CacheView(batch.engine)
    old, new = Camera(batch, cache, Tokens), Camera(batch, cache, Tokens)
    old.close()
    assert batch.runtime.tap is not None
    new.close()
    assert batch.runtime.tap is None


# ----------------------------------------------------------------------------------------- watching


def test_nothing_is_done_while_nobody_watches(batch: PretendedBatch, live: Live) -> None:
    async def watch() -> None:
        assert batch.runtime.tap is None
        with live.seat():
            await first(live.pictures(), 1)
            assert batch.runtime.tap is not None
        await asyncio.sleep(2 * PERIOD)
        assert batch.runtime.tap is None
        with live.seat():  # and again
            await first(live.pictures(), 1)

    asyncio.run(watch())


def test_all_watchers_share_one_camera(
    live: Live, batch: PretendedBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    original = live_module.Camera

    def note(*parts: Any) -> Camera:
        made.append(original(*parts))
        return made[-1]

    monkeypatch.setattr(live_module, "Camera", note)

    async def watch() -> None:
        with live.seat(), live.seat():
            await asyncio.gather(first(live.pictures(), 3), first(live.pictures(), 3))

    asyncio.run(watch())
    assert len(made) == 1


def test_too_many_are_sent_away_and_a_free_seat_is_given_again(live: Live) -> None:
    async def watch() -> None:
        with live.seat():
            with live.seat(), pytest.raises(Busy, match="2 pages watch already"):
                live.seat().__enter__()
            with live.seat():
                assert len(await first(live.pictures(), 1)) == 1

    asyncio.run(watch())


def test_a_slow_watcher_gets_the_newest(live: Live, batch: PretendedBatch) -> None:
    async def watch() -> tuple[bytes, bytes]:
        with live.seat():
            async with aclosing(live.pictures()) as slow:
                first_one = await anext(slow)
                for batch.now["waiting"] in range(1, 6):
                    await first(live.pictures(), 2)
                return first_one, await anext(slow)

    found = [json.loads(picture[6:])["waiting"] for picture in asyncio.run(watch())]
    assert found == [0, 5]


def test_a_camera_that_breaks_ends_the_stream(
    live: Live, batch: PretendedBatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def watch() -> list[dict[str, Any]]:
        with live.seat():
            del batch.now["running"]  # a snapshot cannot be made
            return await first(live.pictures(), 1)

    assert asyncio.run(watch()) == []


def test_closing_sends_everybody_away(live: Live) -> None:
    async def watch() -> int:
        with live.seat():
            await first(live.pictures(), 1)
            live.close()
            return len(await first(live.pictures(), 1000))

    assert asyncio.run(watch()) <= 1


# ---------------------------------------------------------------------------------------- over HTTP


@pytest.fixture
def client(live: Live) -> TestClient:
    app = FastAPI()
    app.include_router(live_module.routes(lambda: live))
    return TestClient(app)


def test_the_last_picture_of_a_server_that_drains_says_so(
    client: TestClient, batch: PretendedBatch
) -> None:
    batch.now["draining"] = True
    response = client.get("/understudy/live")
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-store"
    (event,) = response.text.split("\n\n")[:-1]
    assert json.loads(event.removeprefix("data: "))["draining"] is True


def test_who_leaves_gives_back_the_seat(batch: PretendedBatch, live: Live) -> None:
    app = FastAPI()
    app.include_router(live_module.routes(lambda: live))
    with listening(app) as port:
        for _ in range(5):  # more than there are seats
            with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
                client.sendall(b"GET /understudy/live HTTP/1.1\r\nHost: test\r\n\r\n")
                assert b"200 OK" in client.recv(1000)
                until(lambda: batch.runtime.tap is not None)
            until(lambda: batch.runtime.tap is None)


@contextmanager
def listening(app: FastAPI) -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def until(holds: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it has not happened"
        time.sleep(0.005)


def test_facts(client: TestClient) -> None:
    facts = client.get("/understudy/model").json()
    assert facts["model"] == "tiny"
    assert facts["layers"][1] == {"name": "model.layers.1.mlp.experts", "experts": EXPERTS}
    assert (facts["context"], facts["experts_per_token"]) == (512, 2)
    assert facts["tiers"] == {"slow": "disk", "fast": "host"}
    assert facts["plan"]["slot_bytes"] == SLOT_BYTES
    assert facts["policies"]["evictor"] == "lru"


def test_layers_add_up_to_the_whole(client: TestClient, batch: PretendedBatch) -> None:
    for layer, ids in ((0, [1, 2]), (0, [2, 3]), (2, [4, 5])):
        batch.event(layer, ids)
    layers = client.get("/understudy/layers").json()["layers"]
    assert [row["hits"] for row in layers] == [1, 0, 0]
    assert [row["resident"] for row in layers] == [3, 0, 2]
    for name in ("events", "hits", "late", "misses"):
        assert sum(row[name] for row in layers) == getattr(batch.counters, name)
