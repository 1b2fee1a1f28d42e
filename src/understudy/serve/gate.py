"""What stands before every route: the API key, a name and a tally mark for every request.

Knows: headers. Does not know: routes, except which of them are open to everybody.
All are plain ASGI: they neither buffer a stream nor hide a disconnect.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from understudy.serve.errors import Problem, problem_of

REQUEST_ID = "x-request-id"
_SANE = re.compile(r"[\x21-\x7e]{1,128}")

# For probes and scrapers. Numbers about the whole server, never about what somebody asked.
OPEN = frozenset({"/health", "/ping", "/version", "/metrics", "/openapi.json"})


class RequestIds:
    """Gives every request an id, the client's own where it brought one, and sends it back."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        name = Headers(scope=scope).get(REQUEST_ID, "")
        name = name if _SANE.fullmatch(name) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = name

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = name
            await send(message)

        return await self._app(scope, receive, send_named)


class Caught:
    """What nobody has foreseen is an answer like any other: in the envelope, with a name, counted.
    The framework's own place for this lies before all that stands here."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def send_watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, send_watched)
        except Exception as error:
            if begun:
                raise
            await problem_of(error).response()(scope, receive, send)


class Counted:
    """Tells ``count`` of every response: the path of its route, never what a client wrote instead
    (labels must not grow with what clients invent), and its status."""

    def __init__(self, app: ASGIApp, count: Callable[[str, int], None]) -> None:
        self._app, self._count = app, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(getattr(scope.get("route"), "path", "none"), message["status"])
            await send(message)

        return await self._app(scope, receive, send_counted)


class ApiKey:
    """Lets in who knows ``key``. The page's own files are for everybody: a browser cannot send a
    key before it has shown where to type one."""

    def __init__(self, app: ASGIApp, key: str, open_paths: frozenset[str] = OPEN) -> None:
        self._app = app
        self._open = open_paths
        # A header is bytes; clients write a key beyond ASCII in one of these encodings.
        self._wanted = [_digest(key.encode("utf-8"))]
        if all(ord(c) < 256 for c in key):
            self._wanted.append(_digest(key.encode("latin-1")))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self._may_pass(scope):
            return await self._app(scope, receive, send)
        refusal = Problem(
            401,
            "send the header Authorization: Bearer KEY with the key of this server",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        return await refusal.response()(scope, receive, send)

    def _may_pass(self, scope: Scope) -> bool:
        return scope["path"] in self._open or self._knows_key(scope)

    def _knows_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(given) != 1 or given[0][:7].lower() != b"bearer ":
            return False
        digest = _digest(given[0][7:].strip())
        # All are compared, none in a time that depends on how much of it is right.
        return sum(hmac.compare_digest(digest, wanted) for wanted in self._wanted) > 0


def _digest(key: bytes) -> bytes:
    """Of one length, so that not even the length of a key can be timed."""
    return hashlib.sha256(key).digest()
