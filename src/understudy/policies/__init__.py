"""Minds: the contracts of everything that decides, each with its rules.

Knows: plain values in (`LayerEvent`, the residency book), plain values out. Does not know: files,
tensors' storage, threads, the clock. The same objects run in the engine and in the simulator.

A policy is one small class and one registration line; `docs/write-a-policy.md` shows one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from understudy.core import ExpertId, Guess, LayerEvent
from understudy.policies.residency import Residency


class Exactness(Enum):
    """What a policy may do to the output. Declared by the policy, counted by the runtime."""

    BIT_EXACT = "bit-exact"
    EQUIVALENT = "equivalent"  # rounding only
    LOSSY = "lossy"


class Evictor:
    """Orders the residents by how little they will be missed.

    The director tells it what is used (`touch`), what came (`admit`) and what left (`remove`), and
    asks for `victims`. Residents that must not leave (pinned, in flight, needed by the same event)
    are skipped by the director, so an evictor need not know them.
    May never: touch bytes, change the book, evict by itself.
    """

    exactness = Exactness.BIT_EXACT
    nbytes = 0

    def __init__(self, *, slots: int, layers: int) -> None:
        self.slots, self.layers = slots, layers

    def touch(self, event: LayerEvent, needed: Sequence[ExpertId]) -> None:
        """One event was looked up. ``needed``: its experts, in order of last use."""

    def admit(self, expert: ExpertId, *, speculative: bool) -> None:
        """``expert`` now holds a slot (its bytes may still be on their way). Comes a second time,
        with ``speculative=False``, when a speculated expert is used for the first time."""
        raise NotImplementedError

    def remove(self, expert: ExpertId) -> None:
        """``expert`` lost its slot."""
        raise NotImplementedError

    def victims(self, layer: int, need: int) -> Iterable[ExpertId]:
        """Residents in the order in which they should leave, to make room for ``need`` experts of
        ``layer``. Repeats are allowed; more than ``need`` are expected, since some are skipped."""
        raise NotImplementedError

    def chance(self, expert: ExpertId) -> float | None:
        """How likely ``expert`` is used when its layer comes next, where this evictor has an
        opinion (``None``: it has none). A guess that is less likely does not replace it."""
        return None


class Predictor:
    """Guesses which experts come next. May never start a load."""

    exactness = Exactness.BIT_EXACT
    nbytes = 0
    lookahead = 0  # how many later routers this predictor wants scored (the runtime calls them)
    foresight = "router-input"  # and about what: a name of `experts.foresight`

    def __init__(self, *, layers: int, experts: Sequence[int], depth: int = 1) -> None:
        """``experts``: how many experts each MoE layer has. ``depth``: layers to look ahead."""
        self.layers, self.experts, self.depth = layers, experts, depth

    def observe(self, event: LayerEvent) -> None:
        """The truth about one event; called before `predict` for the same event."""

    def predict(self, event: LayerEvent) -> list[Guess]:
        """Experts of later layers, in any order; probabilities should be calibrated."""
        return []

    def resident(self, guesses: Sequence[Guess]) -> None:
        """These, of its last answer, need not be fetched: how often they are right is no measure
        for the others."""


class Learned(Protocol):
    """What a profile says of a model (`understudy.profile.Profile` is one), as plain values.

    Lists per MoE layer: how often two experts were chosen for one token (``[E][E]``), how alike
    their outputs are (cosine, ``[E][E]``), and the percentiles 0..100 of the normalised entropy of
    the router's choice.
    """

    @property
    def coactivation(self) -> Sequence[Sequence[Sequence[float]]]: ...
    @property
    def similarity(self) -> Sequence[Sequence[Sequence[float]]]: ...
    @property
    def entropy(self) -> Sequence[Sequence[float]]: ...


class RouteTransform:
    """Decides who runs. The *only* place that may change which expert runs, or its weight.
    May never move bytes. Gets the event and the book, answers an event: the same object where
    nothing changes. `core.NOBODY` in place of an expert leaves that (token, rank) out."""

    exactness = Exactness.BIT_EXACT
    wants_scores = False  # needs ``event.scores``
    wants_foretold = False  # needs ``event.foretold``

    def __init__(
        self,
        *,
        layers: int = 0,
        experts: Sequence[int] = (),
        learned: Learned | None = None,
        seed: int = 0,
    ) -> None:
        """``experts``: how many each MoE layer has. ``learned``: a profile of this model, where the
        user gave one. Further keywords are parameters: ``buddy:rho=3`` passes ``rho=3``."""
        self.layers, self.experts, self.learned, self.seed = layers, experts, learned, seed

    def transform(self, event: LayerEvent, book: Residency) -> LayerEvent:
        raise NotImplementedError


class Resolution(NamedTuple):
    """What is done about the missing experts of one event. ``fetch``: loaded into slots, in this
    order. ``in_place``: computed by the processor in host memory. Who is in neither is left out,
    which is lossy."""

    fetch: Sequence[ExpertId] = ()
    in_place: Sequence[ExpertId] = ()


class MissResolver:
    """Decides what to do about experts that are not resident: fetch them, compute them where they
    lie, or leave them out. May never change which expert was chosen.

    An expert that lies on disk comes to host memory in any case, so it makes no difference between
    the first two: what they differ in is whether it crosses the link to the device.
    """

    exactness = Exactness.BIT_EXACT
    needs_device = False  # answers `Resolution.in_place`, which means nothing without a device

    def resolve(
        self, event: LayerEvent, missing: Sequence[ExpertId], book: Residency
    ) -> Resolution:
        """``missing``, each once, shared out. They come in order of last use."""
        raise NotImplementedError

    def touch(self, event: LayerEvent, needed: Sequence[ExpertId]) -> None:
        """One event was resolved, with nobody missing or some. ``needed``: all its experts."""

    def would_fetch(self, expert: ExpertId) -> bool:
        """Whether a miss of ``expert`` would be fetched on demand. If not, it is not prefetched."""
        return True


__all__ = [
    "Evictor",
    "Exactness",
    "Learned",
    "MissResolver",
    "Predictor",
    "Residency",
    "Resolution",
    "RouteTransform",
]
