"""Who leaves: least recently used (global, per layer, or whichever does not cycle), least often
used, frequency over age, frequency that fades, and the clairvoyant oracle.

Knows: which experts are resident and when they were used. Does not know: who is pinned or in
flight (the director skips those), nor anything about bytes.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from understudy.core import ExpertId, LayerEvent
from understudy.policies import Evictor


class _Recency(Evictor):
    """Keeps the residents in order of last use, over all layers and per layer. A speculated expert
    starts at the cold end: until somebody uses it, it is the first to go (the director protects it
    while it is still predicted)."""

    def __init__(self, *, slots: int, layers: int) -> None:
        super().__init__(slots=slots, layers=layers)
        self.order: OrderedDict[ExpertId, None] = OrderedDict()
        self.by_layer: list[OrderedDict[ExpertId, None]] = [OrderedDict() for _ in range(layers)]

    def touch(self, event: LayerEvent, needed: Sequence[ExpertId]) -> None:
        own = self.by_layer[event.layer]
        for expert in needed:
            if expert in self.order:
                self.order.move_to_end(expert)
                own.move_to_end(expert)

    def admit(self, expert: ExpertId, *, speculative: bool) -> None:
        for order in (self.order, self.by_layer[expert.layer]):
            order[expert] = None
            order.move_to_end(expert, last=not speculative)

    def remove(self, expert: ExpertId) -> None:
        del self.order[expert]
        del self.by_layer[expert.layer][expert]


class LruGlobal(_Recency):
    """The least recently used expert of all layers leaves first."""

    def victims(self, layer: int, need: int) -> Iterable[ExpertId]:
        return self.order


class LruLayer(_Recency):
    """Every layer owns an equal share of the slots and evicts its own least recently used expert.

    A layer over its share gives first, the one that ran last before all others: its extra experts
    will not be needed for almost a whole step.
    """

    def victims(self, layer: int, need: int) -> Iterable[ExpertId]:
        return chain(self._over_quota(layer), self.by_layer[layer], self.order)

    def _over_quota(self, layer: int) -> Iterator[ExpertId]:
        for back in range(1, self.layers):
            other = (layer - back) % self.layers
            extra = len(self.by_layer[other]) - self._quota(other)
            if extra > 0:
                yield from list(self.by_layer[other])[:extra]

    def _quota(self, layer: int) -> int:
        return self.slots // self.layers + (layer < self.slots % self.layers)


class Lru(LruLayer):
    """The default: global LRU, except where it would cycle.

    An event that needs n experts announces a sweep of about n x layers. If the slots cannot hold
    one sweep, global LRU evicts every expert just before its layer comes round again (0 % hits on
    the Qwen3 trace at small budgets, and in every prefill); then each layer keeps its own share.
    """

    def __init__(self, *, slots: int, layers: int) -> None:
        super().__init__(slots=slots, layers=layers)
        self.cycling = False

    def touch(self, event: LayerEvent, needed: Sequence[ExpertId]) -> None:
        self.cycling = len(needed) * self.layers > self.slots
        super().touch(event, needed)

    def victims(self, layer: int, need: int) -> Iterable[ExpertId]:
        return super().victims(layer, need) if self.cycling else self.order


class _Frequency(Evictor):
    """Counts uses of every expert ever seen, resident or not."""

    def __init__(self, *, slots: int, layers: int) -> None:
        super().__init__(slots=slots, layers=layers)
        self.uses: dict[ExpertId, int] = {}
        self.last: dict[ExpertId, int] = {}
        self.resident: set[ExpertId] = set()
        self.now = 0

    def touch(self, event: LayerEvent, needed: Sequence[ExpertId]) -> None:
        self.now += 1
        for expert in needed:
            self.uses[expert] = self.uses.get(expert, 0) + 1
            self.last[expert] = self.now

    def admit(self, expert: ExpertId, *, speculative: bool) -> None:
        self.resident.add(expert)

    def remove(self, expert: ExpertId) -> None:
        self.resident.discard(expert)

    def victims(self, layer: int, need: int) -> Iterable[ExpertId]:
        return _ascending((self._worth(e), e) for e in self.resident)

    def _worth(self, expert: ExpertId) -> tuple[float, int]:
        raise NotImplementedError


class Lfu(_Frequency):
    """The least often used expert leaves first; among equals, the least recently used."""

    def _worth(self, expert: ExpertId) -> tuple[float, int]:
        return self.uses.get(expert, 0), self.last.get(expert, 0)


class Lfru(_Frequency):
    """Frequency over age: an expert is worth its uses divided by the events since its last one."""

    def _worth(self, expert: ExpertId) -> tuple[float, int]:
        last = self.last.get(expert, 0)
        return self.uses.get(expert, 0) / (self.now - last + 1), last


_Ranked = tuple[float, int, ExpertId]  # mark, last use, whose


class Lrfu(Evictor):
    """The default: uses that fade at three speeds together, soonest layers dearest.

    Every token of a layer fades the uses of that layer's experts, so an expert's mark is a mixture
    of shares: of the last few tokens, the last twenty and the last two hundred (`FADING`): an
    estimate of the chance that the layer's next token uses it. No single speed describes how a use
    loses its meaning: quickly at first, then ever more slowly. An expert whose layer is a whole
    step away is worth less than one whose layer comes next, by up to `FAR`. The figures were chosen
    on recorded routing; `docs/policies.md` has the table.
    After LRFU: Lee et al., "LRFU: a spectrum of policies that subsumes the LRU and LFU", 2001.
    """

    FADING = ((0.5, 0.10), (0.95, 0.25), (0.995, 0.65))  # left of a use after a token, and share
    FAR = 0.5

    def __init__(self, *, slots: int, layers: int) -> None:
        super().__init__(slots=slots, layers=layers)
        self._marks = [[_Fading(left) for left, _ in self.FADING] for _ in range(layers)]
        self._last: dict[ExpertId, int] = {}
        self._residents: list[set[ExpertId]] = [set() for _ in range(layers)]
        self._ranked: list[list[_Ranked] | None] = [None] * layers
        self._now = 0

    def touch(self, event: LayerEvent, needed: Sequence[ExpertId]) -> None:
        for fading in self._marks[event.layer]:
            fading.use(event.ids)
        for expert in needed:
            self._now += 1
            self._last[expert] = self._now
        self._ranked[event.layer] = None

    def admit(self, expert: ExpertId, *, speculative: bool) -> None:
        self._residents[expert.layer].add(expert)
        self._ranked[expert.layer] = None

    def remove(self, expert: ExpertId) -> None:
        self._residents[expert.layer].discard(expert)
        ranked = self._ranked[expert.layer]
        if ranked is not None:  # who leaves changes nobody's place, and stands near the head
            for place, found in enumerate(ranked):
                if found[2] == expert:
                    del ranked[place]
                    break

    def chance(self, expert: ExpertId) -> float:
        return sum(
            share * fading.share(expert.expert)
            for (_, share), fading in zip(self.FADING, self._marks[expert.layer], strict=True)
        )

    def victims(self, layer: int, need: int) -> Iterator[ExpertId]:
        """Merges the layers' own orders: only the first few are ever taken, so the heap holds no
        more than one resident of each layer."""
        heap: list[tuple[float, int, int, int, float, list[_Ranked]]] = []
        for ahead in range(self.layers):
            ranked = self._order((layer + 1 + ahead) % self.layers)
            if ranked:
                worth = 1 - self.FAR * ahead / self.layers
                mark, last, _ = ranked[0]
                heap.append((mark * worth, last, ahead, 0, worth, ranked))
        heapq.heapify(heap)
        while heap:
            _, _, ahead, place, worth, ranked = heap[0]
            yield ranked[place][2]
            place += 1
            if place < len(ranked):
                mark, last, _ = ranked[place]
                heapq.heapreplace(heap, (mark * worth, last, ahead, place, worth, ranked))
            else:
                heapq.heappop(heap)

    def _order(self, layer: int) -> list[_Ranked]:
        """This layer's residents, the least worth first; sorted again only after a use or an
        arrival. `chance`, written out: a call per resident was half of the time."""
        ranked = self._ranked[layer]
        if ranked is None:
            fast, middle, slow = (fading.uses for fading in self._marks[layer])
            pairs = zip(self.FADING, self._marks[layer], strict=True)
            a, b, c = (share * fading.scale for (_, share), fading in pairs)
            last = self._last
            ranked = []
            for expert in self._residents[layer]:
                e = expert.expert
                # Not used yet (speculated): in none of the three.
                mark = a * fast[e] + b * middle[e] + c * slow[e] if e in slow else 0.0
                ranked.append((mark, last.get(expert, 0), expert))
            ranked.sort()
            self._ranked[layer] = ranked
        return ranked


class _Fading:
    """An exponential average per expert: of every use, ``left`` is left after one more token.

    New uses weigh ever more instead of old ones ever less, so that a token costs its own experts
    only; the scale starts again before it leaves the range of floats.
    """

    def __init__(self, left: float) -> None:
        self._left = left
        self._weight = 1.0  # of a use by the next token
        self.uses: dict[int, float] = {}  # expert -> its mark, in units of 1 / scale

    def use(self, rows: Sequence[Sequence[int]]) -> None:
        uses, weight = self.uses, self._weight
        for row in rows:
            for expert in row:
                uses[expert] = uses.get(expert, 0.0) + weight
            weight /= self._left
            if weight > 1e100:
                uses = {expert: mark / weight for expert, mark in uses.items()}
                weight = 1.0
        self.uses, self._weight = uses, weight

    def share(self, expert: int) -> float:
        """0..1: which part of the recent tokens used ``expert``, the last ones counting most."""
        return self.uses.get(expert, 0.0) * self.scale

    @property
    def scale(self) -> float:
        """What makes a mark a share of the tokens."""
        return (1 - self._left) / (self._left * self._weight)


class Belady(Evictor):
    """The clairvoyant oracle: whoever is needed last, or never again, leaves first.

    For recorded traces only: it must be given the ``future``, the events in the order in which they
    will be touched. Its misses are the floor of every demand policy with the same slots.
    Belady, "A study of replacement algorithms for a virtual-storage computer", 1966.
    """

    def __init__(self, *, slots: int, layers: int, future: Sequence[LayerEvent] = ()) -> None:
        super().__init__(slots=slots, layers=layers)
        if not future:
            raise ValueError("belady is an oracle: it runs on a recorded trace, not in the engine")
        self.uses: dict[ExpertId, list[int]] = {}
        for position, event in reversed(list(enumerate(future))):
            for expert in event.needed():
                self.uses.setdefault(ExpertId(event.layer, expert), []).append(position)
        self.resident: set[ExpertId] = set()
        self.now = -1

    def touch(self, event: LayerEvent, needed: Sequence[ExpertId]) -> None:
        self.now += 1
        for expert in needed:
            self.uses[expert].pop()

    def admit(self, expert: ExpertId, *, speculative: bool) -> None:
        self.resident.add(expert)

    def remove(self, expert: ExpertId) -> None:
        self.resident.discard(expert)

    def victims(self, layer: int, need: int) -> Iterable[ExpertId]:
        return _ascending(((-self._next_use(e), 0), e) for e in self.resident)

    def _next_use(self, expert: ExpertId) -> float:
        ahead = self.uses.get(expert)
        return ahead[-1] if ahead else float("inf")


def _ascending(ranked: Iterable[tuple[tuple[float, int], ExpertId]]) -> Iterator[ExpertId]:
    """Lazily in order: most callers take a few of hundreds."""
    heap = list(ranked)
    heapq.heapify(heap)
    while heap:
        yield heapq.heappop(heap)[1]
