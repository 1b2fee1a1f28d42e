"""How the server says no: OpenAI's envelope for every 4xx and 5xx.

Knows: which refusal has which status, type and code. Does not know: endpoints.

What a user can cure is told in the words of the error. What failed inside is told to the server's
log in full, and to the client in one sentence without paths or tracebacks.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteHTTPException

from understudy.batch import Busy, CannotFit, Draining, EngineDied, Refused
from understudy.batch.grammar import GrammarError
from understudy.batch.sampling import NoToken
from understudy.core import ContextTooLong, ReadFailed

log = logging.getLogger("understudy.serve")

INVALID = "invalid_request_error"


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(BaseModel):
    """What every 4xx and 5xx has for a body."""

    error: ErrorBody


class Problem(HTTPException):
    """An answer that is an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.body = ErrorBody(message=message, type=type, param=param, code=code)

    def envelope(self) -> ErrorEnvelope:
        return ErrorEnvelope(error=self.body)

    def response(self) -> JSONResponse:
        return JSONResponse(self.envelope().model_dump(), self.status_code, self.headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> Problem:
    """The request itself is wrong."""
    return Problem(400, message, param=param, code=code)


def unavailable(
    message: str, code: str, retry_after: float | None = None, status: int = 503
) -> Problem:
    """Not now."""
    headers = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
    return Problem(status, message, type="unavailable_error", code=code, headers=headers)


def problem_of(error: BaseException) -> Problem:
    """What a client is told of ``error``."""
    match error:
        case Problem():
            return error
        case CannotFit() | ContextTooLong():
            return invalid(str(error), code="context_length_exceeded")
        case GrammarError() | NoToken():  # what only shows while the answer is written
            return invalid(str(error))
        case Busy():
            problem = unavailable(str(error), "queue_full", error.retry_after, status=429)
            problem.body.type = "rate_limit_error"
            return problem
        case Draining():
            return unavailable("the server is shutting down", "draining")
        case EngineDied():
            return unavailable(
                "the engine has stopped; the server must be restarted", "engine_dead"
            )
        case Refused():
            return unavailable(str(error), "refused", error.retry_after)
        case ReadFailed():
            log.error("an answer was given up: %s", error)
            return failed("an expert could not be read from disk; the answer was given up")
    log.error("an answer was given up", exc_info=error)
    return failed("the server failed; its log says why")


def failed(message: str) -> Problem:
    return Problem(500, message, type="server_error", code="internal_error")


def require(holds: bool, message: str, param: str | None = None) -> None:
    if not holds:
        raise invalid(message, param)


# ------------------------------------------------------------------------- what the framework says


def install(app: FastAPI) -> None:
    """Every error that a route raises leaves ``app`` in the envelope. (What is no refusal at all,
    `gate.Caught` answers.)"""

    @app.exception_handler(StarletteHTTPException)
    async def told(request: Request, error: StarletteHTTPException) -> JSONResponse:
        return (error if isinstance(error, Problem) else _spoken(request, error)).response()

    @app.exception_handler(RequestValidationError)
    async def mistaken(request: Request, error: RequestValidationError) -> JSONResponse:
        return first_mistake(error.errors()).response()

    @app.exception_handler(Refused)
    async def refused(request: Request, error: Refused) -> JSONResponse:
        return problem_of(error).response()


def _spoken(request: Request, error: StarletteHTTPException) -> Problem:
    """What the framework itself refuses: unknown addresses, wrong methods, broken bodies."""
    match error.status_code:
        case 404:
            message, code = "there is nothing at this address", "not_found"
        case 405:
            message, code = f"{request.method} is not possible here", "method_not_allowed"
        case status:
            phrase = HTTPStatus(status).phrase
            message, code = phrase.lower(), phrase.lower().replace(" ", "_")
    return Problem(error.status_code, message, code=code, headers=error.headers)


def first_mistake(mistakes: Sequence[Any]) -> Problem:
    """pydantic's complaints -> one line about the first."""
    mistake = mistakes[0]
    param = _param(mistake["loc"])
    what = f"'{param}'" if param else "the body"
    match mistake["type"]:
        case "unsupported" | "extra_forbidden":
            return invalid(
                f"{what} is not supported by this server", param, "unsupported_parameter"
            )
        case "missing":
            message = f"{what} is missing" if param else "a JSON body is required"
            return invalid(message, param, "missing_required_parameter")
        case "value_error":
            reason = str(mistake["ctx"]["error"])
        case "too_short" | "too_long":
            bounds, kind = mistake["ctx"], mistake["type"]
            most = kind == "too_long"
            limit = (
                f"at most {bounds['max_length']}" if most else f"at least {bounds['min_length']}"
            )
            reason = f"must have {limit} elements"
        case "model_attributes_type" | "model_type" | "dict_type":
            reason = "must be a JSON object"
        case _:
            reason = mistake["msg"].replace("Input should", "must", 1)
    return invalid(f"{what}: {reason}" if reason[:4] != "must" else f"{what} {reason}", param)


def _param(loc: Sequence[str | int]) -> str | None:
    """("body", "messages", 0, "role") -> messages[0].role"""
    name = ""
    for part in loc[1:]:
        if isinstance(part, str) and part.startswith("("):  # an alternative, no field
            continue
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name[:200] or None
