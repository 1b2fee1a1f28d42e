"""Replays recorded routing through the engine's own policies, with a virtual clock.

Knows: events, the policies and the director, a machine described by a few numbers. Does not know:
files, tensors, models, real time. ``replay`` counts only (loads take no time); ``simulate`` carries
plans out in the engine's order against a `Machine`; ``published`` counts as others have published.
"""

from __future__ import annotations

from understudy.simulate.link import Link, Machine
from understudy.simulate.published import Counted, published
from understudy.simulate.replay import replay
from understudy.simulate.run import Minds, Outcome, Sizes, simulate
from understudy.simulate.sweep import Beside, Published, Row, beside, sweep

__all__ = [
    "Beside",
    "Counted",
    "Link",
    "Machine",
    "Minds",
    "Outcome",
    "Published",
    "Row",
    "Sizes",
    "beside",
    "published",
    "replay",
    "simulate",
    "sweep",
]
