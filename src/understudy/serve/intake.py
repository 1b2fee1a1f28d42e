"""From bytes on a socket to a JSON value that nothing further in can trip over.

Knows: how much may come, how long it may take, and what JSON is allowed to be here: UTF-8, no NaN
or Infinity, no key twice, no half of a surrogate pair, not too deep, not too many keys.
Does not know: what the value should look like (`protocol` does).

`json.loads` is more generous than JSON in all these points, and each generosity has a victim:
a tokenizer cannot encode half a pair, two parsers disagree about a key that comes twice.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable, Coroutine
from email.message import Message
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect

from understudy.serve.errors import Problem, invalid
from understudy.serve.settings import MAX_JSON_DEPTH, MAX_JSON_KEYS, Settings

SMALL = 64 << 10


class JsonRoute(APIRoute):
    """A route whose body is read by a `JsonRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read_strictly(request: Request) -> Response:
            try:
                return await handle(JsonRequest(request.scope, request.receive))
            except ClientDisconnect:
                return client_gone()

        return read_strictly


class JsonRequest(Request):
    """A request that brings one JSON value."""

    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            settings: Settings = self.app.state.settings
            require_json(self.headers.get("content-type"))
            self._body = await self._read(settings.max_body_size, settings.body_timeout)
        return self._body

    async def json(self) -> Any:
        body = await self.body()
        # A large one is looked through in a thread: the others must not wait for it.
        return parse(body) if len(body) < SMALL else await asyncio.to_thread(parse, body)

    async def _read(self, limit: int, timeout: float) -> bytes:
        announced = self.headers.get("content-length", "0")
        if not announced.isdigit() or int(announced[:20]) > limit:
            raise too_large(limit)
        body = bytearray()
        try:
            async with asyncio.timeout(timeout):
                async for piece in self.stream():
                    body += piece
                    if len(body) > limit:
                        raise too_large(limit)
        except TimeoutError:
            raise Problem(
                408,
                f"the body did not arrive within {timeout:g} seconds",
                code="body_timeout",
                headers={"Connection": "close"},
            ) from None
        return bytes(body)


def client_gone() -> Response:
    """Nobody reads this; the access log does (nginx's number for it)."""
    return Response(status_code=499)


def too_large(limit: int) -> Problem:
    return Problem(413, f"the body is larger than {limit} bytes", code="body_too_large")


def require_json(content_type: str | None) -> None:
    """Also keeps web pages of other sites out: without a preflight they cannot send this type."""
    message = Message()
    message["content-type"] = content_type or ""
    kind = message.get_content_type()
    charset = str(message.get_param("charset") or "utf-8").lower()
    json_like = kind == "application/json" or (
        kind.startswith("application/") and kind.endswith("+json")
    )
    if not content_type or not json_like or charset not in ("utf-8", "utf8", "us-ascii"):
        raise Problem(
            415, "send the header Content-Type: application/json", code="unsupported_media_type"
        )


def parse(body: bytes) -> Any:
    """The JSON value in ``body``, or a `Problem`."""
    try:
        value = json.loads(
            body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant
        )
    except UnicodeDecodeError:
        raise invalid("the body is not UTF-8", code="invalid_json") from None
    except RecursionError:
        raise _too_deep() from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise invalid(
            f"the body is not JSON: {error.msg} at {where}", code="invalid_json"
        ) from None
    except ValueError as error:  # ours, or an integer of thousands of digits
        reason = str(error) if isinstance(error, _NotAllowed) else "a number has too many digits"
        raise invalid(f"the body is not JSON: {reason}", code="invalid_json") from None
    _inspect(value)
    return value


class _NotAllowed(ValueError):
    pass


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_JSON_KEYS:
        raise invalid(f"an object has more than {MAX_JSON_KEYS} keys", code="invalid_json")
    made = dict(pairs)
    if len(made) < len(pairs):
        ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise _NotAllowed(f"the key {twice[:80]!a} comes twice")
    return made


def _no_constant(name: str) -> None:
    raise _NotAllowed(f"{name} is not a JSON number")


def _too_deep() -> Problem:
    return invalid(f"the body is nested deeper than {MAX_JSON_DEPTH} levels", code="invalid_json")


def _inspect(value: Any) -> None:
    """Level by level, so that depth costs no stack."""
    level, depth = [value], 0
    while level:
        if depth > MAX_JSON_DEPTH:
            raise _too_deep()
        below: list[Any] = []
        for item in level:
            if type(item) is int:  # a prompt may be a million of them
                continue
            if type(item) is dict:
                below.extend(item)
                below.extend(item.values())
            elif type(item) is list:
                below.extend(item)
            elif type(item) is str:
                _require_whole(item)
            elif type(item) is float and not math.isfinite(item):
                raise invalid("the body has a number that is too large", code="invalid_json")
        level, depth = below, depth + 1


def _require_whole(text: str) -> None:
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError:
        raise invalid(
            "a string has half of a surrogate pair (\\ud800 to \\udfff alone)", code="invalid_json"
        ) from None
