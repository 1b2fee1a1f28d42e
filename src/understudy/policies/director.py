"""One event in, one plan out: look up, resolve, choose victims, predict.

Knows: the residency book and the policies. Does not know: files, tensors, threads, the clock. Every
method is called with the book's lock held. The engine and the simulator drive the same object:

    plan = decide(event)      look up everything the event needs, before anything moves
    commit(load)              a demand load takes its slot (now, or when its victim was computed)
    guesses = foresee(event)  once its loads are on their way: what comes after this event
    place(guess)              a speculation takes its slot, if it may, at the moment it is issued
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

from understudy.core import Counters, ExpertId, Guess, LayerEvent, LayerPlan, Load
from understudy.policies import Evictor, MissResolver, Predictor, RouteTransform
from understudy.policies.predict import SelfSwitch
from understudy.policies.residency import Residency, Slot, State

LEAST = 0.5  # a guess that is wrong more often than right takes the link from one that is right
FOLLOWERS = (
    16  # of those computed in place, the newest: more than idle moments between layers carry
)


class _Names(dict[int, ExpertId]):
    """Expert -> its id, for one layer."""

    def __init__(self, layer: int) -> None:
        super().__init__()
        self._layer = layer

    def __missing__(self, expert: int) -> ExpertId:
        found = self[expert] = ExpertId(self._layer, expert)
        return found


class Director:
    """See the head of this file. ``counters`` are filled as plans are made and carried out;
    ``by_layer`` has the events and lookups of each layer."""

    def __init__(
        self,
        book: Residency,
        *,
        evictor: Evictor,
        predictor: Predictor,
        resolver: MissResolver,
        route: RouteTransform,
        switch: SelfSwitch,
        nbytes: Callable[[ExpertId], int],
        ample: bool = False,
    ) -> None:
        """``nbytes``: what a load of an expert moves, for the counters. ``ample``: there is a slot
        for every expert, so nobody ever leaves and the evictor is not asked."""
        self.book, self.evictor, self.predictor = book, evictor, predictor
        self.resolver, self.route, self.switch = resolver, route, switch
        self.nbytes, self.ample = nbytes, ample
        self.counters = Counters()
        self.by_layer: defaultdict[int, Counters] = defaultdict(Counters)
        self._wanted: set[ExpertId] = set()  # predicted, and their layer has not come yet
        self._followers: dict[ExpertId, None] = {}  # computed in place, newest last; see `foresee`
        self._names: dict[int, _Names] = {}

    # ---------------------------------------------------------------------------------- one event

    def decide(self, event: LayerEvent) -> LayerPlan:
        """Look up all experts of ``event`` at once, then plan loads and order."""
        event = self.route.transform(event, self.book)
        needed = self._named(event)
        hits, late, missing = self._look_up(needed)
        self._count(event.layer, hits, late, missing)
        if not self.ample:
            self.evictor.touch(event, needed)
        if self._wanted:
            # The truth about this layer is here; guesses about it protect nobody any more.
            self._wanted = {e for e in self._wanted if e.layer != event.layer}
        fetched, in_place, skipped = self._resolve(event, missing)
        self.resolver.touch(event, needed)
        # Hits first: they are computed while the loads fly.
        order = hits + late + fetched
        loads = self._place_loads(event, fetched, order, needed) if fetched else []
        return LayerPlan(
            event=event,
            hits=tuple(hits),
            late=tuple(late),
            loads=tuple(loads),
            order=tuple(order),
            in_place=in_place,
            skipped=skipped,
        )

    def _resolve(
        self, event: LayerEvent, missing: Sequence[ExpertId]
    ) -> tuple[list[ExpertId], tuple[ExpertId, ...], tuple[ExpertId, ...]]:
        """Who is fetched, who is computed in place, and who is left out."""
        if not missing:
            return [], (), ()
        fetch, in_place = self.resolver.resolve(event, missing, self.book)
        self.counters.computed_in_place += len(in_place)
        for expert in in_place:
            self._followers.pop(expert, None)
            self._followers[expert] = None
        served = {*fetch, *in_place}
        return list(fetch), tuple(in_place), tuple(e for e in missing if e not in served)

    def foresee(self, event: LayerEvent) -> tuple[Guess, ...]:
        """Guesses worth issuing after ``event``, soonest and likeliest first. An empty answer
        cancels the old ones. Asked once per event, after `decide`.

        Last come those that were computed in place: whoever was needed once may be again, and where
        nobody else needs the link they follow. Without that the cache would age, because what is
        never fetched is never a hit.
        """
        self.predictor.observe(event)
        guesses = self.predictor.predict(event) if self.switch.on else []
        followers = self._following() if self._followers else []
        self._wanted = {g.expert for g in guesses} | self._followers.keys()
        if not guesses:
            return tuple(followers)
        self.predictor.resident([g for g in guesses if g.expert in self.book])
        missing = [g for g in guesses if g.probability >= LEAST and g.expert not in self.book]
        useful = [g for g in missing if self.resolver.would_fetch(g.expert)]
        useful.sort(key=lambda g: (g.layers_until, -g.probability))
        return (*useful, *followers)

    def _following(self) -> list[Guess]:
        """Those computed in place that have not arrived yet, newest first: as likely as the evictor
        thinks, so that they replace nobody likelier."""
        waiting = [e for e in reversed(self._followers) if not self.book.ready(e)][:FOLLOWERS]
        self._followers = dict.fromkeys(reversed(waiting))
        chances = ((e, self.evictor.chance(e)) for e in waiting if e not in self.book)
        return [
            Guess(e, 1.0 if chance is None else chance, self.evictor.layers)
            for e, chance in chances
            if self.resolver.would_fetch(e)
        ]

    def wanted(self, expert: ExpertId) -> bool:
        """Whether ``expert`` is predicted and its layer has not come yet."""
        return expert in self._wanted

    def _named(self, event: LayerEvent) -> list[ExpertId]:
        """The experts of ``event``. Each has one name for good: making names anew was slow."""
        names = self._names.get(event.layer)
        if names is None:
            names = self._names[event.layer] = _Names(event.layer)
        return [names[e] for e in event.needed()]

    def _look_up(
        self, needed: Sequence[ExpertId]
    ) -> tuple[list[ExpertId], list[ExpertId], list[ExpertId]]:
        hits: list[ExpertId] = []
        late: list[ExpertId] = []
        missing: list[ExpertId] = []
        find = self.book.slot
        for expert in needed:
            slot = find(expert)
            if slot is None:
                missing.append(expert)
            else:
                (hits if slot.state is State.READY else late).append(expert)
        return hits, late, missing

    def _count(
        self,
        layer: int,
        hits: Sequence[ExpertId],
        late: Sequence[ExpertId],
        missing: Sequence[ExpertId],
    ) -> None:
        c = self.counters
        for count in (c, self.by_layer[layer]):
            count.events += 1
            count.hits += len(hits)
            count.late += len(late)
            count.misses += len(missing)
        if c.prefetch_issued == 0:
            return
        for expert in (*hits, *late):
            slot = self.book.slot(expert)
            if slot is not None and slot.unused:
                slot.unused = False
                c.prefetch_used += 1
                self.evictor.admit(expert, speculative=False)

    # ------------------------------------------------------------------------------------- loads

    def _place_loads(
        self,
        event: LayerEvent,
        missing: Sequence[ExpertId],
        order: Sequence[ExpertId],
        needed: Sequence[ExpertId],
    ) -> list[Load]:
        """Free slots first, then victims, then (an event larger than the slots) waves.

        A load may start when its victim is evictable; most are at once.
        """
        free = min(self.book.free, len(missing))
        keep = set(needed)
        outside = self._victims(event.layer, len(missing) - free, keep)
        if free + len(outside) < len(missing):
            # Speculation on its way to somebody else: its slot is free to take once it has landed.
            flying = [e for e in self.book if e not in keep and not self.book.ready(e)]
            outside += flying[: len(missing) - free - len(outside)]
        victims: list[ExpertId | None] = [None] * free
        victims += outside
        victims += self._own_victims(order, needed, waiting=missing[len(victims) :])
        return [Load(expert, victim) for expert, victim in zip(missing, victims, strict=True)]

    def _victims(self, layer: int, count: int, keep: set[ExpertId]) -> list[ExpertId]:
        """Up to ``count`` residents that may leave, predicted ones only if nobody else can."""
        if count <= 0:
            return []
        chosen: dict[ExpertId, None] = {}
        spared: dict[ExpertId, None] = {}
        for expert in self.evictor.victims(layer, count):
            if expert in keep or not self.book.evictable(expert):
                continue
            (spared if expert in self._wanted else chosen)[expert] = None
            if len(chosen) == count:
                return list(chosen)
        return [*chosen, *spared][:count]

    def _own_victims(
        self, order: Sequence[ExpertId], needed: Sequence[ExpertId], waiting: Sequence[ExpertId]
    ) -> list[ExpertId]:
        """For each waiting load an expert of the same event, computed before it, that it replaces:
        the one whose last use lies furthest back, so that the end of the prompt stays."""
        if not waiting:
            return []
        last_use = {expert: i for i, expert in enumerate(needed)}
        first = order.index(waiting[0])
        computed = [(last_use[e], e) for e in order[:first]]
        heapq.heapify(computed)
        victims = []
        for expert in waiting:
            victims.append(heapq.heappop(computed)[1])
            heapq.heappush(computed, (last_use[expert], expert))
        return victims

    def may_start(self, load: Load) -> bool:
        """Whether the victim can leave now, or has left by itself (its speculation failed)."""
        if load.victim is None or load.victim not in self.book:
            return self.book.free > 0
        return self.book.evictable(load.victim)

    def commit(self, load: Load) -> Slot:
        """The load takes its slot; its victim leaves. The expert is not pinned yet."""
        if load.victim is not None and load.victim in self.book:
            self._evict(load.victim)
        slot = self.book.reserve(load.expert)
        self.counters.demand_bytes += self.nbytes(load.expert)
        self.evictor.admit(load.expert, speculative=False)
        return slot

    def welcome(self, expert: ExpertId) -> Slot:
        """A free slot for one that is brought before anybody asks: neither demand nor guess."""
        slot = self.book.reserve(expert)
        self.evictor.admit(expert, speculative=False)
        return slot

    def bring(self, load: Load) -> None:
        """`commit` for callers whose loads take no time, or who keep time by themselves."""
        self.commit(load)
        self.book.launch(load.expert)
        self.book.land(load.expert)

    def residents(self) -> dict[ExpertId, int]:
        """Who is in which slot, whoever would leave first coming first. Nobody may be on the way or
        pinned: this is for handing the slots to somebody else."""
        leaving = [] if self.ample else list(self.evictor.victims(0, len(self.book)))
        order = dict.fromkeys([*(e for e in leaving if e in self.book), *self.book])
        return {expert: self.book[expert].index for expert in order}

    def take_over(self, residents: Sequence[tuple[ExpertId, int]]) -> None:
        """Somebody else had the slots and leaves these in them, least recently used first."""
        stay = {expert for expert, slot in residents if self._sits(expert, slot)}
        for expert in list(self.book):
            self.evictor.remove(expert)
            if expert not in stay:
                self.book.evict(expert)
        for expert, slot in residents:
            if expert not in stay:  # to search the free slots for each of thousands takes long
                self.book.seat(expert, slot)
            self.evictor.admit(expert, speculative=False)

    def _sits(self, expert: ExpertId, index: int) -> bool:
        slot = self.book.slot(expert)
        return slot is not None and slot.index == index

    def _evict(self, victim: ExpertId) -> None:
        slot = self.book.evict(victim)
        self.evictor.remove(victim)
        self.counters.evictions += 1
        if slot.unused:
            self.counters.prefetch_wasted += 1
            self.counters.wasted_bytes += self.nbytes(victim)

    def forget(self, expert: ExpertId, unread: int = 0) -> None:
        """Its load failed or was given up with ``unread`` bytes to go: the slot is free again."""
        slot = self.book.slot(expert)
        if slot is not None and slot.unused:
            self.counters.prefetch_bytes -= unread
            self.counters.prefetch_wasted += 1
            self.counters.wasted_bytes += self.nbytes(expert) - unread
        self.book.fail(expert)
        self.evictor.remove(expert)

    # ------------------------------------------------------------------------------- speculation

    def place(self, guess: Guess) -> Slot | None:
        """Take a slot for a speculation at the moment it is issued; ``None``: it may not.

        It evicts nobody who is predicted too, in flight or pinned, nor anybody whom the evictor
        thinks likelier to be used.
        """
        expert = guess.expert
        if expert in self.book or expert not in self._wanted:
            return None
        if not self.book.free:
            victims: Iterable[ExpertId] = self.evictor.victims(expert.layer, 1)
            victim = next(
                (v for v in victims if v not in self._wanted and self.book.evictable(v)), None
            )
            if victim is None or (self.evictor.chance(victim) or 0.0) > guess.probability:
                return None
            self._evict(victim)
        slot = self.book.reserve(expert, unused=True)
        self.evictor.admit(expert, speculative=True)
        self.counters.prefetch_issued += 1
        self.counters.prefetch_bytes += self.nbytes(expert)
        return slot
