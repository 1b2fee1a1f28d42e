"""A server that speaks the completions API without a model: what it answers is told it.

Each token is one word; ``/tokenize`` gives a word its length as its id.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeServer:
    """``fault``: which of the ways to go wrong, of every answer whose number it divides."""

    longest: int | None = 64
    delay: float = 0.0
    fault: str = ""
    every: int = 1
    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    paths: set[str] = field(default_factory=set)
    running: int = 0
    peak: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def events(self, body: dict[str, Any], fault: str) -> Iterator[str]:
        """What is streamed, without the framing."""
        count = body["max_tokens"]
        for number in range(count):
            time.sleep(self.delay)
            last = number == count - 1
            if fault == "error" and last:
                yield json.dumps({"error": {"message": "the disk failed", "type": "server_error"}})
                return
            if fault == "no finish" and last:
                break
            text = "" if number == 0 else "\u2028 word"  # half a character comes without text
            reason = "length" if last else None
            yield json.dumps(
                {"choices": [{"text": text, "finish_reason": reason}]}, ensure_ascii=False
            )
        if fault != "no usage":
            usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": count}
            yield json.dumps({"choices": [], "usage": usage})
        yield "[DONE]"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: else the second waits for the first one's receipt
    fake: FakeServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        one = {"id": "fake", "object": "model", "max_model_len": self.fake.longest}
        if self.fake.longest is None:
            del one["max_model_len"]
        self._json(200, {"object": "list", "data": [one]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fake = self.fake
        fake.paths.add(self.path)
        fake.keys.add(self.headers["Authorization"])
        if self.path == "/tokenize":
            if fake.fault == "no tokenize":
                return self._json(404, {"detail": "Not Found"})
            return self._json(200, {"tokens": [len(word) for word in body["prompt"].split()]})
        with fake.lock:
            fake.asked.append(body)
            fault = fake.fault if len(fake.asked) % fake.every == 0 else ""
            fake.running += 1
            fake.peak = max(fake.peak, fake.running)
        if fault == "busy":
            self._json(429, {"error": {"message": "the queue is full", "type": "overloaded"}})
        else:
            self._stream(fake.events(body, fault))
        with fake.lock:
            fake.running -= 1
        return None

    def _json(self, status: int, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, events: Iterator[str]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for event in events:
            self.wfile.write(f"data: {event}\n\n".encode())
            self.wfile.flush()


@contextmanager
def serving(fake: FakeServer) -> Iterator[FakeServer]:
    """``fake.url`` answers until the block ends."""
    handler = type("Handler", (_Handler,), {"fake": fake})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        fake.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join()
