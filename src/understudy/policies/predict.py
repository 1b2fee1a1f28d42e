"""Who comes: guesses about the experts of later layers, and the switch that silences them.

Knows: past events, and what later layers' own routers said about the current router input (the
runtime calls them; their answers come inside the event). Does not know: who is resident, what a
load costs, how to start one.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from understudy.core import NOBODY, ExpertId, Guess, LayerEvent
from understudy.policies import Predictor


class NoPrediction(Predictor):
    """Never guesses: every expert is loaded on demand."""


class _Calibrated(Predictor):
    """Turns ranked candidates into probabilities by counting how often each rank was right, among
    the experts that were not resident: those are rarer, and a guess of them is less often right."""

    def __init__(self, *, layers: int, experts: Sequence[int], depth: int = 1) -> None:
        super().__init__(layers=layers, experts=experts, depth=depth)
        # Layer -> (expert, how far ahead) -> its rank, until that layer comes.
        self._open: dict[int, dict[tuple[int, int], int]] = {}
        self._right: dict[tuple[int, int], float] = {}
        self._asked: dict[tuple[int, int], float] = {}

    def observe(self, event: LayerEvent) -> None:
        came = event.needed()
        for (expert, ahead), rank in self._open.pop(event.layer, {}).items():
            key = ahead, rank
            # Halving keeps the estimate on the last few hundred guesses.
            if self._asked.get(key, 0) > 256:
                self._asked[key] /= 2
                self._right[key] /= 2
            self._asked[key] = self._asked.get(key, 0) + 1
            self._right[key] = self._right.get(key, 0) + (expert in came)

    def _guess(self, layer: int, expert: int, rank: int, ahead: int) -> Guess:
        key = (ahead, rank)
        self._open.setdefault(layer, {})[expert, ahead] = rank
        # Two imaginary guesses, one of them right: a new rank starts at one half.
        probability = (self._right.get(key, 0) + 1) / (self._asked.get(key, 0) + 2)
        return Guess(ExpertId(layer, expert), probability, ahead)

    def resident(self, guesses: Sequence[Guess]) -> None:
        for guess in guesses:
            (layer, expert), ahead = guess.expert, guess.layers_until
            self._open.get(layer, {}).pop((expert, ahead), None)


class LastToken(_Calibrated):
    """The next layers will use what they used for the previous token."""

    def __init__(self, *, layers: int, experts: Sequence[int], depth: int = 1) -> None:
        super().__init__(layers=layers, experts=experts, depth=depth)
        self._last: list[tuple[int, ...]] = [()] * layers

    def observe(self, event: LayerEvent) -> None:
        super().observe(event)
        last = event.ids[-1] if event.ids else ()
        self._last[event.layer] = tuple(e for e in last if e != NOBODY)

    def predict(self, event: LayerEvent) -> list[Guess]:
        guesses = []
        for ahead in range(1, self.depth + 1):
            layer = (event.layer + ahead) % self.layers
            for rank, expert in enumerate(self._last[layer]):
                guesses.append(self._guess(layer, expert, rank, ahead))
        return guesses


class Popularity(_Calibrated):
    """The next layers will use what they used most often so far."""

    def __init__(self, *, layers: int, experts: Sequence[int], depth: int = 1) -> None:
        super().__init__(layers=layers, experts=experts, depth=depth)
        self._uses = [[0] * n for n in experts]

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        return 8 * sum(self.experts)  # one count per expert

    def observe(self, event: LayerEvent) -> None:
        super().observe(event)
        for row in event.ids:
            for expert in row:
                if expert != NOBODY:
                    self._uses[event.layer][expert] += 1

    def predict(self, event: LayerEvent) -> list[Guess]:
        guesses = []
        k = len(event.ids[0]) if event.ids else 0
        for ahead in range(1, self.depth + 1):
            layer = (event.layer + ahead) % self.layers
            uses = self._uses[layer]
            ranked = sorted(range(len(uses)), key=uses.__getitem__, reverse=True)
            for rank, expert in enumerate(e for e in ranked[:k] if uses[e]):
                guesses.append(self._guess(layer, expert, rank, ahead))
        return guesses


class NextGate(_Calibrated):
    """The next layers' own routers, asked about the *current* router input: hidden states change
    little from layer to layer, so they mostly answer what they will answer when their turn comes.

    For several tokens (prefill) an expert's rank is the best it got from any token.
    """

    @property
    def lookahead(self) -> int:  # type: ignore[override]
        return self.depth

    def predict(self, event: LayerEvent) -> list[Guess]:
        guesses = []
        for layer, (ids, _weights) in sorted(event.lookahead.items()):
            best: dict[int, int] = {}
            for row in ids:
                for rank, expert in enumerate(row):
                    best[expert] = min(rank, best.get(expert, rank))
            for expert, rank in best.items():
                guesses.append(self._guess(layer, expert, rank, layer - event.layer))
        return guesses


class ResidualGate(NextGate):
    """The next layers' routers, asked about the current router input plus what it changes by on
    average until then. Needs a profile. DALI (spec 02, "residual vector")."""

    foresight = "residual"


class DriftGate(NextGate):
    """The next layers' own norm and router, asked about the residual stream before the experts:
    what the quasi-hidden state is without default vectors."""

    foresight = "drift"


class QuasiGate(NextGate):
    """The next layers' own norm and router, asked about the residual stream plus the weighted mean
    outputs of the experts that run now. Needs a profile. Speculating Experts (arXiv 2603.19289)."""

    foresight = "quasi"


class SharedGate(NextGate):
    """The same, with the true output of the shared experts. Needs a profile, and a model that has
    shared experts."""

    foresight = "shared"


class Estimated(NextGate):
    """One small network for all layers, trained to say what the next router will say. Needs a
    profile with an estimator. Speculating Experts (arXiv 2603.19289), 6: Est-PF."""

    foresight = "estimator"


class Hybrid(NextGate):
    """The estimator for the layers where it measured better, `QuasiGate` for the others. Needs a
    profile with an estimator. Speculating Experts (arXiv 2603.19289), 6: Hybrid-PF."""

    foresight = "hybrid"


class SelfSwitch:
    """Speculation switches itself off while it loses.

    Losing, defined: after `WARM_UP` decode steps, in alternating blocks of `BLOCK` steps without
    and with speculation, the median step was slower with it by more than `DOUBT`. The trial is
    repeated, since texts and machines change: sooner after a loss, because a lost trial is as often
    noise as truth and off earns nothing. It is given measured seconds; it reads no clock.
    """

    WARM_UP = 8  # a cold cache would be blamed on whoever comes first
    BLOCK = 6
    BLOCKS = 6  # off, on, off, on, off, on
    SETTLE = 2  # the first steps of a block still live off (or suffer from) the block before
    DOUBT = 0.02  # less than a trial can tell apart
    REST, REST_OFF = 1024, 256

    def __init__(self, *, enabled: bool = True, adaptive: bool = True) -> None:
        """``enabled``: whether it is ever on; ``adaptive``: whether it may switch."""
        self.adaptive = enabled and adaptive
        self.on = enabled
        self._begin()

    def _begin(self) -> None:
        self._step = 0
        self._with: list[float] = []
        self._without: list[float] = []

    def record(self, seconds: float) -> None:
        """One decode step took ``seconds``."""
        if not self.adaptive:
            return
        place = self._step - self.WARM_UP
        trial = 0 <= place < self.BLOCK * self.BLOCKS
        if trial and place % self.BLOCK >= self.SETTLE:
            (self._with if self.on else self._without).append(seconds)
        self._step += 1
        self._decide(place + 1)

    def _decide(self, place: int) -> None:
        """Whether the step at ``place`` (counted from the start of the trial) speculates."""
        end = self.BLOCK * self.BLOCKS
        if 0 <= place < end:
            self.on = (place // self.BLOCK) % 2 == 1
        elif place == end:
            self.on = median(self._with) <= median(self._without) * (1 + self.DOUBT)
        elif place >= end + (self.REST if self.on else self.REST_OFF):
            self._begin()
            self.on = True
