"""Serves the page: a handful of files, read once, each under its own name.

Knows: which files there are, and what a browser must be told about them. Does not know: what they
say. No path is ever made from a request.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from hashlib import sha256
from importlib.resources import files

from fastapi import APIRouter, Request, Response

TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
FILES = (
    "index.html",
    "style.css",
    "icon.svg",
    "app.js",
    "chat.js",
    "charts.js",
    "colours.js",
    "live.js",
    "map.js",
    "stream.js",
    "theme.js",
    "words.js",
)
PATHS = frozenset({"/", *(f"/page/{name}" for name in FILES if name != "index.html")})

# Nothing from elsewhere, nothing inline, nobody around it.
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; object-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def routes() -> APIRouter:
    """``/`` and ``/page/...``."""
    router = APIRouter(include_in_schema=False)
    folder = files("understudy.serve") / "page"
    for name in FILES:
        serve = _served((folder / name).read_bytes(), TYPES[name.rpartition(".")[2]])
        path = "/" if name == "index.html" else f"/page/{name}"
        router.add_api_route(path, serve, methods=["GET", "HEAD"])
    return router


def _served(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    tag = f'"{sha256(content).hexdigest()[:16]}"'

    async def serve(request: Request) -> Response:
        headers = {**HEADERS, "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return serve
