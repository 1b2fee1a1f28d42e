"""What is seen of the engine from outside, put together: metrics, the live picture, the page.

Knows: its parts, and that they are made before there is a model. Does not know: how one is loaded.
"""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter

from understudy.serve import live, web
from understudy.serve.live import Live
from understudy.serve.metrics import Metrics
from understudy.serve.served import Batch


class Outside:
    """``routers`` are there at once; ``open`` gives them something to show.

    ``require``: raises what a client is to be told while there is no model."""

    open_paths = web.PATHS  # a browser cannot send a key before it has shown where to type one

    def __init__(self, model_name: str, require: Callable[[], object]) -> None:
        self._model, self._require = model_name, require
        self._live: Live | None = None
        self.routers: tuple[APIRouter, ...] = (live.routes(self._find), web.routes())

    def open(self, batch: Batch) -> Metrics:
        """The model is loaded: look at it from now on."""
        self._live, metrics = Live(batch, self._model), Metrics(batch, self._model)
        batch.add_observer(self._live)
        batch.add_observer(metrics)
        return metrics

    def _find(self) -> Live:
        self._require()
        assert self._live is not None, "a model that answers is looked at"
        return self._live
