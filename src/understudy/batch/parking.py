"""Forwards that wait at their experts, and the hub that answers all of them together.

Knows: greenlets, the seam, what hooks leave in a `Forward`. Does not know: rows, caches, what a
forward is of.

    row 0:  attention, router | waits .............. | resumes with its part
    row 1:            attention, router | waits .... | resumes with its part
    hub:                                 one experts call for the tokens of both

A model's forward is not touched: it runs in a `greenlet` that is left where it calls its experts
and entered again with their answer. The hub lets every fiber come to a call, then answers those of
the lowest MoE layer together: an expert that several need is looked up, loaded and computed once.
Who waits holds no expert. To the seam all of them are one forward.

Grad mode belongs to the thread, contexts to greenlets: the hub holds the first for all fibers, and
`fiber_of_now` tells calls from inside a fiber from all others, which pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from greenlet import GreenletExit, greenlet

from understudy.core import Forward, current_forward

log = logging.getLogger("understudy.batch")

# ---------------------------------------------------------------------------------------- fibers


class Call(NamedTuple):
    """What a row asks of the experts of MoE layer ``layer``: hidden [T, H], ids and weights
    [T, k]."""

    layer: int
    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor


class Fiber:
    """The forward of one row. ``call``: what it waits for; ``None``: it is over. ``result``: of
    ``work``. ``forward``: its own, where the hooks on routers leave what they see."""

    def __init__(self, number: int, forward: Forward, work: Callable[[], Any]) -> None:
        self.number, self.forward, self._work = number, forward, work
        self.call: Call | None = None
        self.result: Any = None
        self._greenlet = greenlet(self._run)

    def _run(self) -> None:
        """A greenlet begins with a context of its own, and an empty one."""
        fiber_of_now.set(self)
        current_forward.set(self.forward)
        self.result = self._work()

    def wait_for(self, call: Call) -> torch.Tensor:
        """Called inside: back to the hub, until it has an answer."""
        self.call = call
        answer: torch.Tensor = self._greenlet.parent.switch()
        return answer

    def go_on(self, *answer: torch.Tensor) -> None:
        """Called by the hub: on to the next call. Raises what the forward raises."""
        self.call = None
        self._greenlet.switch(*answer)

    def end(self) -> None:
        """However far it came. What it does on its way out is nobody's concern any more."""
        if not self._greenlet.dead:
            with suppress(Exception):
                self._greenlet.throw(GreenletExit)


fiber_of_now: ContextVar[Fiber | None] = ContextVar("understudy_fiber", default=None)


class Parking:
    """Stands before the seam of one model: rows wait here, all others pass."""

    def __init__(self, seam: Any) -> None:
        self.seam = seam

    def __call__(
        self, layer: int, hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        fiber = fiber_of_now.get()
        if fiber is None:
            return self.seam(layer, hidden, ids, weights)  # type: ignore[no-any-return]
        return fiber.wait_for(Call(layer, hidden, ids, weights))


# ------------------------------------------------------------------------------------------- hub


class Hub:
    """Runs the fibers of one step. Called where `current_forward` is the step's."""

    def __init__(self, seams: Sequence[Any], apart: dict[int, str]) -> None:
        """``seams``: who answers, per MoE layer. ``apart``: where it is noted that the rows of a
        layer could not be shown to its router as one, and why."""
        self._seams, self._apart = seams, apart
        self._last: list[tuple[int, int]] = []  # of the event before: rows and their tokens

    def run(self, fibers: Sequence[Fiber]) -> None:
        with ExitStack() as ends:
            for fiber in fibers:
                ends.callback(fiber.end)
                fiber.go_on()
            while waiting := [f for f in fibers if f.call is not None]:
                layer = min(f.call.layer for f in waiting if f.call is not None)
                here = [f for f in waiting if f.call is not None and f.call.layer == layer]
                for fiber, answer in zip(here, self._ask(layer, here), strict=True):
                    fiber.go_on(answer)

    def _ask(self, layer: int, fibers: Sequence[Fiber]) -> Sequence[torch.Tensor]:
        """One event for all of them."""
        calls = [f.call for f in fibers if f.call is not None]
        counts = [len(call.hidden) for call in calls]
        self._describe(layer, fibers, counts)
        hidden = _joined([call.hidden for call in calls])
        ids = _joined([call.ids for call in calls])
        weights = _joined([call.weights for call in calls])
        return torch.split(self._seams[layer](layer, hidden, ids, weights), counts)

    def _describe(self, layer: int, fibers: Sequence[Fiber], counts: Sequence[int]) -> None:
        """The event's rows, and what their routers saw, into the step's `Forward`."""
        step = current_forward.get()
        assert step is not None
        here = [(f.number, n) for f, n in zip(fibers, counts, strict=True)]
        if here != self._last:
            self._last, step.foretold = here, {}  # it was about other tokens
            step.requests = [row for row, n in here for _ in range(n)]
        own = [f.forward for f in fibers]
        try:
            step.router_args = merged([f.router_args for f in own], counts)
            step.residuals = merged([f.residuals for f in own], counts)
        except NotMerged as e:
            step.router_args, step.residuals = {}, {}
            if layer not in self._apart:
                log.warning("layer %d is not looked ahead for several rows at once: %s", layer, e)
            self._apart[layer] = str(e)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class NotMerged(Exception):
    """These cannot be arguments of one call over the tokens of all; the text says why."""


def merged(parts: Sequence[Any], counts: Sequence[int]) -> Any:
    """The same argument of several calls, as it would be in one call over the tokens of all.
    ``counts``: the tokens of each call."""
    first = parts[0]
    if all(part is first for part in parts):
        return first
    if any(type(part) is not type(first) for part in parts):
        raise NotMerged("its router is called in different ways")
    if isinstance(first, torch.Tensor):
        return _merged_tensors(parts, counts)
    if isinstance(first, tuple | list):
        if any(len(part) != len(first) for part in parts):
            raise NotMerged("its router is called in different ways")
        return type(first)(merged(of_all, counts) for of_all in zip(*parts, strict=True))
    if isinstance(first, dict):
        if any(part.keys() != first.keys() for part in parts):
            raise NotMerged("its router is called in different ways")
        return {key: merged([part[key] for part in parts], counts) for key in first}
    if all(part == first for part in parts):
        return first
    raise NotMerged(f"its router is given something of each row's own: {type(first).__name__}")


def _merged_tensors(parts: Sequence[torch.Tensor], counts: Sequence[int]) -> torch.Tensor:
    """Vectors of tokens [.., T, H] or numbers of tokens [.., T], one behind the other."""
    axis = -2 if parts[0].is_floating_point() and parts[0].ndim > 1 else -1
    for part, count in zip(parts, counts, strict=True):
        tokens = part.shape[: part.ndim + axis + 1]
        if part.ndim == 0 or part.shape[axis] != count or tokens.numel() != count:
            raise NotMerged("its router is given a tensor that is not one line per token")
    try:
        return torch.cat(list(parts), dim=axis)
    except RuntimeError as e:
        raise NotMerged(f"its router's tensors differ between rows: {e}") from None
