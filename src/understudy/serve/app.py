"""Puts the server's parts together to an ASGI application.

Knows: the order in which a request meets them. Does not know: sockets, signals, how a model is
loaded (`run`).
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version

from fastapi import APIRouter, FastAPI
from starlette.middleware.cors import CORSMiddleware

from understudy.serve import errors, gate
from understudy.serve.routes import errors as errors_of
from understudy.serve.routes import router
from understudy.serve.served import Stage
from understudy.serve.settings import Settings


def create_app(
    stage: Stage,
    settings: Settings,
    *,
    routers: Iterable[APIRouter] = (),
    open_paths: Iterable[str] = (),
) -> FastAPI:
    """``routers``: more of them, such as the page's. ``open_paths``: those of their addresses that
    need no API key."""
    app = FastAPI(
        title="Understudy",
        description="OpenAI's API before Mixture-of-Experts models larger than their memory.",
        version=version("understudy"),
        docs_url=None,  # these pages would come from hosts elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.stage, app.state.settings = stage, settings
    errors.install(app)
    app.include_router(router)
    for more in routers:
        app.include_router(more, responses=errors_of(401, 429, 503))
    _stand_before(app, stage, settings, frozenset(open_paths))
    return app


def _stand_before(
    app: FastAPI, stage: Stage, settings: Settings, open_paths: frozenset[str]
) -> None:
    """The last one added meets a request first: even a refused one has a name, and tells a browser
    what it may read."""
    app.add_middleware(gate.Caught)
    if settings.api_key is not None:
        app.add_middleware(gate.ApiKey, key=settings.api_key, open_paths=gate.OPEN | open_paths)
    app.add_middleware(gate.Counted, count=stage.count)
    app.add_middleware(gate.RequestIds)
    if settings.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.allowed_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=[gate.REQUEST_ID, "retry-after"],
        )
