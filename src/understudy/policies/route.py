"""Who runs: the router's choice, or (one day, by name) somebody else.

Knows: the event and the residency book. Does not know: bytes, queues. The only room that may change
which expert runs; anything here that does so is lossy and counted by the runtime.
"""

from __future__ import annotations

from understudy.core import LayerEvent
from understudy.policies import RouteTransform
from understudy.policies.residency import Residency


class AsRouted(RouteTransform):
    """The router decides."""

    def transform(self, event: LayerEvent, book: Residency) -> LayerEvent:
        return event
