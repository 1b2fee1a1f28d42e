"""On a miss: what to do about an expert that is not resident. So far: fetch it.

Knows: the event and who is missing. Does not know: where the bytes are or who must leave for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from understudy.core import ExpertId, LayerEvent
from understudy.policies import MissResolver


class Fetch(MissResolver):
    """Load every missing expert, those used by the end of the prompt last."""

    def fetch(self, event: LayerEvent, missing: Sequence[ExpertId]) -> Iterator[ExpertId]:
        return iter(missing)
