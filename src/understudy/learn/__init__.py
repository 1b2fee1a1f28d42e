"""Reads text through a model and writes down what it learns about it: a profile.

Knows: the order of the work, and what it holds in memory. Does not know: terminals; how each part
is measured is in the files beside this one.

    text     files -> windows of tokens, every fifth held out
    count    routing and experts' outputs, over the windows that are learned from
    train    the estimator, over the same windows (it needs the mean outputs)
    recall   how well each foresight guesses the next layer, over windows held out
    probe    all experts on the same tokens; a layer without its last rank

Half of what is held out decides where the estimator is worth asking, the other half is reported:
choosing the better of two on the same text would flatter it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from understudy import model as guest
from understudy import plan as planning
from understudy.anatomy import Anatomy, fingerprint
from understudy.core import BudgetTooSmall, UnderstudyError
from understudy.engine import Engine
from understudy.experts.estimator import Estimator
from understudy.experts.foresight import Estimated, Foresight, Quasi, Residual
from understudy.experts.lookahead import Lookahead
from understudy.experts.runtime import Runtime, Seen
from understudy.learn.count import Counts
from understudy.learn.probe import (
    Sample,
    Sensitivity,
    keeps_logits,
    sensitivity,
    similarity,
    watched,
)
from understudy.learn.recall import Recall
from understudy.learn.text import Source, Windows, read, windows
from understudy.learn.train import Pairs, Training, train
from understudy.profile import Profile

__all__ = ["Settings", "Source", "Training", "learn", "read"]

Report = Callable[[int, int], None]  # (done, in all)
Bar = Callable[[str], Report]


@dataclass(frozen=True, slots=True)
class Settings:
    """What to read and measure. ``smoothing``: how many mean outputs of its layer an expert's own
    are mixed with. ``sample``: tokens per layer that all experts are run on. ``probed``: windows
    read again without the last rank of each layer. ``estimator``: how to train one, if at all."""

    tokens: int = 65_536
    window: int = 256
    smoothing: float = 16.0
    sample: int = 192
    probed: int = 4
    seed: int = 0
    estimator: Training | None = None


def learn(
    source: str | Path,
    texts: Sequence[Source],
    settings: Settings = Settings(),
    *,
    memory: str | int = "auto",
    threads: int | None = None,
    say: Callable[[str], None] = lambda line: None,
    bar: Bar = lambda label: lambda done, total: None,
) -> Profile:
    """A profile of ``source``. ``memory`` covers the model and what is held while learning, but
    not the text itself."""
    started = time.perf_counter()
    with _opened(source, settings, memory, threads, say) as engine:
        work = _Work(engine, settings, texts, bar)
        with torch.no_grad():
            return work.profile(started)


# -------------------------------------------------------------------------------------- memory


@contextmanager
def _opened(
    source: str | Path, s: Settings, memory: str | int, threads: int | None,
    say: Callable[[str], None],
) -> Iterator[Engine]:  # fmt: skip
    anatomy = Anatomy.of(source)
    longest = guest.longest_context(anatomy.checkpoint.config)
    if longest is not None and s.window > longest:
        raise UnderstudyError(
            f"--window {s.window}: {anatomy.name} was made for {longest} tokens; ask for less"
        )
    own = held_bytes(anatomy, s)
    total = planning.parse_memory(memory, anatomy.checkpoint.nbytes)
    options = {"predictor": "none", "frame": "eager", "max_context": s.window}
    try:
        engine = Engine(
            source, memory=max(1, total - own), threads=threads, on_status=say,
            prefill_chunk_size=s.window, **options,
        )  # fmt: skip
    except BudgetTooSmall as e:
        smallest = e.smallest_bytes + own
        raise BudgetTooSmall(
            f"learning about {anatomy.name} needs {planning.shown_size(smallest)}, of which "
            f"{planning.shown_size(own)} hold what is learned; raise --memory, or ask for fewer "
            "--estimator-tokens",
            smallest,
        ) from e
    with engine:
        yield engine


def held_bytes(a: Anatomy, s: Settings) -> int:
    """What learning holds beside the model."""
    text = guest.text_config(a.checkpoint.config)
    layers, experts = len(a.modules), max(m.num_experts for m in a.modules)
    hidden, wide = int(text.hidden_size), a.dtype("auto").itemsize
    counts = layers * experts * (8 * experts + (8 + 8 + 4) * hidden)
    sample = s.sample * hidden * (layers * wide + experts * (wide + 4)) + s.sample * experts**2 * 4
    pairs = 0
    if s.estimator is not None:
        pairs = layers * min(s.estimator.tokens, s.tokens) * (hidden * wide + experts * 2 + 8)
    return counts + sample + 2 * pairs  # kept in pieces, then put together


# --------------------------------------------------------------------------------------- the work


class _Work:
    """One profile being made."""

    def __init__(self, engine: Engine, s: Settings, texts: Sequence[Source], bar: Bar) -> None:
        self.engine, self.s, self.texts, self.bar = engine, s, texts, bar
        handle = engine.model.understudy
        self.anatomy: Anatomy = handle.anatomy
        self.runtime: Runtime = handle.runtime
        self.experts = [m.num_experts for m in self.anatomy.modules]
        self.layers = len(self.experts)
        self.routers = guest.routers(engine.model, self.anatomy.modules)
        self.keep = {"logits_to_keep": 1} if keeps_logits(engine.model) else {}
        guest.watch_residuals(engine.model, self.anatomy.modules)

    def profile(self, started: float) -> Profile:
        with guest.quiet():
            cut = windows(self._encode, self.texts, self.s.tokens, self.s.window, self.s.seed)
        counts, sample = self._count(cut.learned)
        vectors = counts.default_vectors(self.s.smoothing)
        change = counts.residual_vectors()
        network, training = self._train(cut.learned, counts, vectors)
        known = self._foresights(vectors, change, network)
        seen = self._recall(cut.reported, known, counts, "how well each foresight guesses")
        better = self._choose(cut.chosen, known, counts)
        alike, poor = similarity(
            self.runtime, sample, self.experts, self.bar("all experts on the same tokens")
        )
        cost = sensitivity(
            self._logits, self.runtime, self.layers, cut.learned[: self.s.probed],
            self.bar("each layer without its last rank"),
        )  # fmt: skip
        tensors = {
            "uses": counts.uses,
            "coactivation": counts.coactivation,
            "similarity": alike,
            "entropy": counts.entropy_percentiles(),
            "default_vectors": vectors,
            "sensitivity": cost.nats,
        }
        if change is not None:
            tensors["residual_vectors"] = change
        if network is not None:
            tensors |= network.tensors()
            tensors["estimator_better"] = torch.tensor(better, dtype=torch.int64)
        provenance = {
            **self._origin(cut),
            **_about_experts(counts, self.s, poor),
            **_about_recall(seen, better),
            **_about_cost(cost),
            "estimator": training,
            "seconds": round(time.perf_counter() - started, 1),
        }
        return Profile(tensors, provenance)

    # ------------------------------------------------------------------------------ reading text

    def _encode(self, text: str) -> Sequence[int]:
        return self.engine.encode(text)

    def _read(
        self, text: Sequence[Sequence[int]], watch: Callable[[Seen], None], label: str
    ) -> None:
        report = self.bar(label)
        with watched(self.runtime, watch):
            for number, window in enumerate(text):
                self.engine.model(input_ids=torch.tensor([window]), use_cache=False, **self.keep)
                report(number + 1, len(text))

    def _logits(self, window: Sequence[int]) -> torch.Tensor:
        out = self.engine.model(input_ids=torch.tensor([window]), use_cache=False)
        logits: torch.Tensor = out.logits[0]
        return logits

    def _count(self, text: Sequence[Sequence[int]]) -> tuple[Counts, Sample]:
        counts, sample = Counts(self.experts), Sample(self.layers, self._drawn(len(text)))

        def watch(seen: Seen) -> None:
            counts(seen)
            sample(seen)

        self._read(text, watch, "reading")
        return counts, sample

    def _drawn(self, count: int) -> dict[int, list[int]]:
        """Number of the window -> positions of the tokens that all experts will be run on."""
        places = range(count * self.s.window)
        drawn: dict[int, list[int]] = {}
        dice = random.Random(self.s.seed)
        for place in sorted(dice.sample(places, min(self.s.sample, len(places)))):
            drawn.setdefault(place // self.s.window, []).append(place % self.s.window)
        return drawn

    # ----------------------------------------------------------------------------- looking ahead

    def _train(
        self, text: Sequence[Sequence[int]], counts: Counts, vectors: torch.Tensor
    ) -> tuple[Estimator | None, dict[str, Any] | None]:
        how = self.s.estimator
        if how is None:
            return None, None
        started = time.perf_counter()
        quasi = Quasi(vectors)
        quasi.norms.update(counts.norms)
        pairs = Pairs(quasi, Lookahead(self.routers), max(self.experts))
        some = text[: max(1, how.tokens // self.s.window)]
        self._read(some, pairs, "reading for the estimator")
        if not len(pairs):
            raise UnderstudyError(
                f"{self.anatomy.name} shows no residual stream in front of its routers, which the "
                "estimator is asked about; leave out --estimator"
            )
        network, log = train(
            pairs, self.layers, how, self.s.seed, self.bar("training the estimator")
        )
        return network, {
            **asdict(how),
            "width": network.down.out_features,
            "parameters": sum(p.numel() for p in network.parameters()),
            "tokens": sum(map(len, some)),
            "pairs": len(pairs),
            "loss": log,
            "seconds": round(time.perf_counter() - started, 1),
        }

    def _foresights(
        self, vectors: torch.Tensor, change: torch.Tensor | None, network: Estimator | None
    ) -> dict[str, Foresight | None]:
        known: dict[str, Foresight | None] = {"router-input": None}
        if change is not None:
            known["residual"] = Residual(change)
        known |= {"drift": Foresight(), "quasi": Quasi(vectors)}
        shared = guest.shared_experts(self.engine.model, self.anatomy.modules)
        if any(shared):
            known["shared"] = Quasi(vectors, shared)
        if network is not None:
            known["estimator"] = Estimated(vectors, network, [True] * self.layers)
        return known

    def _recall(
        self, text: Sequence[Sequence[int]], known: dict[str, Foresight | None], counts: Counts,
        label: str,
    ) -> Recall:  # fmt: skip
        seen = Recall(self.routers, known, counts.norms, counts.uses)
        self._read(text, seen, label)
        return seen

    def _choose(
        self, text: Sequence[Sequence[int]], known: dict[str, Foresight | None], counts: Counts
    ) -> list[bool] | None:
        """Per layer, whether the estimator guesses it better than its own router does."""
        if "estimator" not in known:
            return None
        two = {name: known[name] for name in ("quasi", "estimator")}
        seen = self._recall(text, two, counts, "where the estimator is better")
        pairs = zip(seen.recall("estimator"), seen.recall("quasi"), strict=True)
        return [a is not None and (b is None or a > b) for a, b in pairs]

    # -------------------------------------------------------------------------------- provenance

    def _origin(self, cut: Windows) -> dict[str, Any]:
        tokens = cut.tokens()
        k = guest.experts_per_token(self.anatomy.checkpoint.config)
        return {
            "model": self.anatomy.name,
            "fingerprint": fingerprint(self.anatomy, self.engine.model),
            "format": self.anatomy.checkpoint.format,
            "layers": self.layers,
            "experts": self.experts,
            "top_k": k,
            "data": [source.as_dict() for source in self.texts],
            "tokens": {"read": sum(tokens.values()), **tokens},
            "window": self.s.window,
            "seed": self.s.seed,
            "versions": {n: version(n) for n in ("understudy", "torch", "transformers")},
        }


def _about_experts(counts: Counts, s: Settings, poor: Sequence[int]) -> dict[str, Any]:
    return {
        "smoothing": s.smoothing,
        "rarely_chosen": counts.rare(s.smoothing),
        "never_chosen": counts.rare(1),
        "similarity": {"tokens": s.sample, "rows_over_all_tokens": list(poor)},
    }


def _about_recall(seen: Recall, better: Sequence[bool] | None) -> dict[str, Any]:
    """Lists per layer that is guessed; ``None`` where it cannot be."""
    recall = {name: seen.recall(name) for name in seen.tallies}
    weighted = {name: seen.weighted(name) for name in seen.tallies}
    if better is not None:
        for table in (recall, weighted):
            both = zip(better, table["estimator"], table["quasi"], strict=True)
            table["hybrid"] = [a if use else b for use, a, b in both]
    cosine = {name: [m.value for m in means] for name, means in seen.cosines.items()}
    return {
        "recall": _rounded(recall),
        "weighted_recall": _rounded(weighted),
        "cosine": _rounded(cosine),
        "estimator_better": None if better is None else [int(b) for b in better],
    }


def _about_cost(cost: Sensitivity) -> dict[str, Any]:
    return {
        "sensitivity": [round(x, 6) for x in cost.nats.tolist()],
        "sensitivity_tokens": cost.tokens,
    }


def _rounded(table: dict[str, list[float | None]]) -> dict[str, list[float | None]]:
    return {n: [None if x is None else round(x, 5) for x in row] for n, row in table.items()}
