"""Replays recorded routing through the engine's own policies, with a virtual clock.

Knows: events, the policies and the director, a machine described by a few numbers. Does not know:
files, tensors, models, real time. ``replay`` counts only (loads take no time); ``simulate`` carries
plans out in the engine's order against a `Machine`; ``published`` counts as others have published.
"""

from __future__ import annotations

from understudy.simulate.link import Link, Machine
from understudy.simulate.published import Published, published
from understudy.simulate.replay import replay
from understudy.simulate.run import Minds, Outcome, Sizes, simulate

__all__ = [
    "Link",
    "Machine",
    "Minds",
    "Outcome",
    "Published",
    "Sizes",
    "published",
    "replay",
    "simulate",
]
