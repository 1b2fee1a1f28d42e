"""The expert cache as seen from outside: who is resident, how often each is used, what it costs.

Knows: where a loaded model keeps its residency book, plan and counters. Does not know: HTTP, JSON,
who looks. Nothing here changes what the engine does, and the book is read without its lock: a
picture may be one expert behind, and the engine never waits for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from understudy.core import Counters, LayerEvent, Tier
from understudy.engine import Engine
from understudy.plan import Plan
from understudy.policies.residency import State

ABSENT, LOADING, RESIDENT = 0, 1, 2
_SHOWN = {
    State.FREE: ABSENT,
    State.RESERVED: LOADING,
    State.IN_FLIGHT: LOADING,
    State.READY: RESIDENT,
}

_NOTHING = Counters()
HALF_LIFE = 2.0  # seconds after which a use counts half


class CacheView:
    """See the head of this file. A cell is a (layer, expert); cells are numbered layer by layer."""

    def __init__(self, engine: Engine) -> None:
        handle = engine.model.understudy
        self._handle, self._director = handle, handle.runtime.director
        self.plan: Plan = handle.plan
        self.modules = handle.anatomy.modules
        self.experts: list[int] = [module.num_experts for module in self.modules]
        self._first = np.cumsum([0, *self.experts])
        on_host = handle.options.device == "cpu"
        self.slow, self.fast = (Tier.DISK, Tier.HOST) if on_host else (Tier.HOST, Tier.DEVICE)

    @property
    def cells(self) -> int:
        return sum(self.experts)

    @property
    def policies(self) -> dict[str, Any]:
        """Names of the policies, and what is on now."""
        found: dict[str, Any] = self._handle.policies
        return found

    @property
    def speculating(self) -> bool:
        """Whether experts are fetched before they are asked for; it switches itself off."""
        return bool(self._director.switch.on)

    @property
    def resident_bytes(self) -> int:
        """What the experts that are in slots now take there, those on their way included."""
        return len(self._director.book) * self.plan.slot_bytes

    def states(self) -> npt.NDArray[np.uint8]:
        """ABSENT, LOADING or RESIDENT, of every cell."""
        found = np.zeros(self.cells, np.uint8)
        for slot in self._director.book.slots:
            expert = slot.expert
            if expert is not None:
                found[self._first[expert.layer] + expert.expert] = _SHOWN[slot.state]
        return found

    def lookups(self) -> list[tuple[int, int, int]]:
        """Hits, late and misses of each layer since the load. Without those that a device has
        decided by itself."""
        counted = (self._counted(layer) for layer in range(len(self.modules)))
        return [(c.hits, c.late, c.misses) for c in counted]

    def _counted(self, layer: int) -> Counters:
        return self._director.by_layer.get(layer) or _NOTHING

    def by_layer(self) -> list[dict[str, int | str]]:
        """Events and lookups of each layer, as in `lookups`, and how many of it are resident."""
        states, rows = self.states(), []
        for layer, module in enumerate(self.modules):
            counted = self._counted(layer)
            here = states[self._first[layer] : self._first[layer + 1]]
            rows.append(
                {
                    "layer": layer,
                    "name": module.name,
                    "experts": module.num_experts,
                    "resident": int((here == RESIDENT).sum()),
                    "loading": int((here == LOADING).sum()),
                    "events": counted.events,
                    "hits": counted.hits,
                    "late": counted.late,
                    "misses": counted.misses,
                }
            )
        return rows

    def start_heat(self) -> Heat:
        """Listen to events from now on."""
        heat = Heat(self.experts)
        self._handle.runtime.tap = heat.count
        return heat

    def stop_heat(self, heat: Heat) -> None:
        """Stop, unless somebody else listens by now."""
        if self._handle.runtime.tap == heat.count:
            self._handle.runtime.tap = None


class Heat:
    """How many tokens used each expert lately. Counted on the engine's thread, read on another."""

    def __init__(self, experts: list[int]) -> None:
        self._experts = experts
        self._fresh = self._none()
        self._heat = np.zeros(sum(experts))

    def _none(self) -> list[list[int]]:
        return [[0] * count for count in self._experts]

    def count(self, event: LayerEvent) -> None:
        uses = self._fresh[event.layer]
        for expert, tokens in event.needed().items():
            uses[expert] += tokens

    def after(self, seconds: float) -> npt.NDArray[np.float64]:
        """Uses per cell, older ones fading; ``seconds`` since this was asked last."""
        fresh, self._fresh = self._fresh, self._none()
        self._heat *= 0.5 ** (seconds / HALF_LIFE)
        self._heat += np.concatenate([np.asarray(row) for row in fresh])
        return self._heat
