"""Who leaves: least recently used (global, per layer, or whichever does not cycle), least often
used, frequency over age, frequency that fades, and the clairvoyant oracle.

Knows: which experts are resident and when they were used. Does not know: who is pinned or in
flight (the director skips those), nor anything about bytes.
"""

from __future__ import annotations

import heapq
from bisect import insort
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


_Worth = tuple[float, int, ExpertId]  # two marks, whose


class _Heaped(Evictor):
    """Keeps the residents in a heap by a worth that changes only when they are used.

    A use pushes a new entry and leaves the old one where it is: `_entry` says which one counts.
    """

    def __init__(self, *, slots: int, layers: int) -> None:
        super().__init__(slots=slots, layers=layers)
        self._heap: list[_Worth] = []
        self._entry: dict[ExpertId, _Worth] = {}

    def _worth(self, expert: ExpertId) -> _Worth:
        raise NotImplementedError

    def _push(self, expert: ExpertId) -> None:
        entry = self._entry[expert] = self._worth(expert)
        heapq.heappush(self._heap, entry)

    def _used(self, needed: Sequence[ExpertId]) -> None:
        """Give those who are resident their new places, and sweep out old entries."""
        for expert in needed:
            if expert in self._entry:
                self._push(expert)
        heap, entries = self._heap, self._entry
        while heap and entries.get(heap[0][2]) is not heap[0]:
            heapq.heappop(heap)
        if len(heap) > 2 * len(entries) + 64:
            self._heap = list(entries.values())
            heapq.heapify(self._heap)

    def admit(self, expert: ExpertId, *, speculative: bool) -> None:
        self._push(expert)

    def remove(self, expert: ExpertId) -> None:
        del self._entry[expert]

    def victims(self, layer: int, need: int) -> Iterator[ExpertId]:
        """In order, without taking the heap apart: a parent comes before its two children."""
        heap, entries = self._heap, self._entry
        size, front = len(heap), [(heap[0], 0)] if heap else []
        while front:
            found, place = heapq.heappop(front)
            for child in (2 * place + 1, 2 * place + 2):
                if child < size:
                    heapq.heappush(front, (heap[child], child))
            if entries.get(found[2]) is found:
                yield found[2]


class Lfu(_Heaped):
    """The least often used expert leaves first; among equals, the least recently used. Counts the
    uses of every expert ever seen, resident or not."""

    def __init__(self, *, slots: int, layers: int) -> None:
        super().__init__(slots=slots, layers=layers)
        self.uses: dict[ExpertId, int] = {}
        self.last: dict[ExpertId, int] = {}
        self.now = 0

    def touch(self, event: LayerEvent, needed: Sequence[ExpertId]) -> None:
        self.now += 1
        for expert in needed:
            self.uses[expert] = self.uses.get(expert, 0) + 1
            self.last[expert] = self.now
        self._used(needed)

    def _worth(self, expert: ExpertId) -> _Worth:
        return self.uses.get(expert, 0), self.last.get(expert, 0), expert


class Lfru(Evictor):
    """Frequency over age: an expert is worth its uses divided by the events since its last one.

    Age changes everybody's worth with every event, so victims are sorted anew each time.
    """

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

    def victims(self, layer: int, need: int) -> Iterator[ExpertId]:
        uses, last, after = self.uses, self.last, self.now + 1
        heap = [
            (uses[e] / (after - last[e]), last[e], e) if e in uses else (0.0, 0, e)
            for e in self.resident
        ]
        heapq.heapify(heap)  # most callers take a few of hundreds
        while heap:
            yield heapq.heappop(heap)[2]


_Ranked = tuple[float, int, int]  # mark, last use, which expert of its layer


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
        self._faded = [_Fading(self.FADING) for _ in range(layers)]
        # Residents of each layer, the least worth first; sorted again after its layer was used.
        self._ranked: list[list[_Ranked]] = [[] for _ in range(layers)]
        self._unsorted: set[int] = set()
        self._residents: set[ExpertId] = set()
        self._worths = [1 - self.FAR * ahead / layers for ahead in range(layers)]
        self._now = 0

    def touch(self, event: LayerEvent, needed: Sequence[ExpertId]) -> None:
        faded = self._faded[event.layer]
        faded.use(event.ids)
        faded.stamp(needed, self._now)
        self._now += len(needed)
        self._unsorted.add(event.layer)

    def admit(self, expert: ExpertId, *, speculative: bool) -> None:
        if expert in self._residents:
            self.remove(expert)  # speculated before
        self._sort()
        self._residents.add(expert)
        layer, e = expert
        self._faded[layer].reach(e)
        insort(self._ranked[layer], self._faded[layer].ranked([(0.0, 0, e)])[0])

    def remove(self, expert: ExpertId) -> None:
        self._residents.discard(expert)
        ranked = self._ranked[expert.layer]
        for place, found in enumerate(ranked):
            if found[2] == expert.expert:  # who leaves changes nobody's place
                del ranked[place]
                break

    def chance(self, expert: ExpertId) -> float:
        return self._faded[expert.layer].chance(expert.expert)

    def victims(self, layer: int, need: int) -> Iterator[ExpertId]:
        """Merges the layers' own orders: only the first few are ever taken, so the heap holds no
        more than one resident of each layer."""
        self._sort()
        worths = self._worths
        after = self._ranked[layer + 1 :] + self._ranked[: layer + 1]
        heap = [
            (ranked[0][0] * worth, ranked[0][1], ahead, 0)
            for ahead, (ranked, worth) in enumerate(zip(after, worths, strict=True))
            if ranked
        ]
        heapq.heapify(heap)
        while heap:
            _, _, ahead, place = heap[0]
            ranked = after[ahead]
            yield ExpertId((layer + 1 + ahead) % self.layers, ranked[place][2])
            place += 1
            if place < len(ranked):
                mark, last, _ = ranked[place]
                heapq.heapreplace(heap, (mark * worths[ahead], last, ahead, place))
            else:
                heapq.heappop(heap)

    def _sort(self) -> None:
        """The old order is nearly the new one, and sorted in no time."""
        for layer in self._unsorted:
            ranked = self._faded[layer].ranked(self._ranked[layer])
            ranked.sort()
            self._ranked[layer] = ranked
        self._unsorted.clear()


class _Fading:
    """Three exponential averages per expert of one layer: of every use, ``left`` is left after one
    more token.

    New uses weigh ever more instead of old ones ever less, so that a token costs its own experts
    only; the scale starts again before it leaves the range of floats.
    """

    NEVER = (0.0, 0.0, 0.0, 0)

    def __init__(self, fading: Sequence[tuple[float, float]]) -> None:
        self._left = [left for left, _ in fading]
        self._shares = [share for _, share in fading]
        self._weights = [1.0] * len(fading)  # of a use by the next token
        # By expert: its three marks, in units of 1 / scale, and its last use.
        self.uses: list[tuple[float, float, float, int]] = []

    def reach(self, expert: int) -> None:
        """Have a place for ``expert``."""
        self.uses.extend([self.NEVER] * (expert + 1 - len(self.uses)))

    def use(self, rows: Sequence[Sequence[int]]) -> None:
        for row in rows:
            uses, (a, b, c) = self.uses, self._weights
            for expert in row:
                if expert < 0:
                    continue  # nobody
                if expert >= len(uses):
                    self.reach(expert)
                fast, middle, slow, last = uses[expert]
                uses[expert] = fast + a, middle + b, slow + c, last
            self._age()

    def _age(self) -> None:
        weights = self._weights
        for i, left in enumerate(self._left):
            weights[i] /= left
        if max(weights) > 1e100:
            a, b, c = (weight if weight > 1e100 else 1.0 for weight in weights)
            self.uses[:] = [(f / a, m / b, s / c, last) for f, m, s, last in self.uses]
            self._weights = [1.0 if weight > 1e100 else weight for weight in weights]

    def stamp(self, needed: Sequence[ExpertId], now: int) -> None:
        """These were used now, in this order."""
        for _, expert in needed:
            now += 1
            self.reach(expert)
            fast, middle, slow, _ = self.uses[expert]
            self.uses[expert] = fast, middle, slow, now

    def _scales(self) -> list[float]:
        """What makes a mark a share of the tokens."""
        pairs = zip(self._left, self._weights, strict=True)
        return [(1 - left) / (left * weight) for left, weight in pairs]

    def chance(self, expert: int) -> float:
        """0..1: which part of the recent tokens used ``expert``, the last ones counting most."""
        if expert >= len(self.uses):
            return 0.0
        three = zip(self._shares, self.uses[expert], self._scales(), strict=False)
        return sum(share * (mark * scale) for share, mark, scale in three)

    def ranked(self, of: Sequence[_Ranked]) -> list[_Ranked]:
        """The same experts with their marks as they are now. `chance`, written out: a call for each
        was half of the time."""
        a, b, c = (share * scale for share, scale in zip(self._shares, self._scales(), strict=True))
        uses = self.uses
        return [
            (a * fast + b * middle + c * slow, last, e)
            for _, _, e in of
            for fast, middle, slow, last in (uses[e],)
        ]


class Belady(_Heaped):
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

    def touch(self, event: LayerEvent, needed: Sequence[ExpertId]) -> None:
        for expert in needed:
            self.uses[expert].pop()
        self._used(needed)

    def _worth(self, expert: ExpertId) -> _Worth:
        ahead = self.uses.get(expert)
        return -ahead[-1] if ahead else float("-inf"), 0, expert
