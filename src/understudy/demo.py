"""The main job in one go: text from a model larger than its memory, then proof that it is exact.

Knows: where the reference models lie, how a twin of realistic size is made, which three ways of
running it are compared, and what equal means (every token, every bit of every logit).
Does not know: terminals. It is given functions to call with text, status and progress.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from understudy import bench
from understudy import plan as planning
from understudy.bench import LRU, NO_CACHE, UNDERSTUDY, Rates, Report, Row
from understudy.core import NotEnoughDisk, Phase, UnderstudyError
from understudy.native import cache_folder

REFERENCE_MODELS = ("fine", "coarse")  # the first that exists
RESIDENT_SHARE = 0.4
TWIN_BYTES = 1536 * planning.MIB
HIDDEN_MULTIPLE = 4  # a power of four: only then is the twin exact
OPENING = "The history of the city began when"

Bar = Callable[[str], Report]

# ---------------------------------------------------------------------------------- the models


def models_folder() -> Path:
    """``models/`` of the repository this package is run from, or of the current folder."""
    named = os.environ.get("UNDERSTUDY_MODELS")
    places = [Path(named)] if named else [Path(__file__).parents[2] / "models", Path("models")]
    for place in places:
        if place.is_dir():
            return place
    raise UnderstudyError(
        "the reference models are not here; run this in a clone of Understudy, or name their "
        "folder in UNDERSTUDY_MODELS"
    )


def reference_model() -> Path:
    """The small trained model that needs no network."""
    folder = models_folder()
    for name in REFERENCE_MODELS:
        if (folder / name / "config.json").is_file():
            return folder / name
    raise UnderstudyError(f"{folder} holds none of {', '.join(REFERENCE_MODELS)}; clone again")


def twin_of(model: Path, bar: Bar, multiple: int | None = None) -> Path:
    """The wide twin of ``model``, made now if it is not in the cache.

    ``multiple``: how many times wider its experts are; without it, about `TWIN_BYTES` in all.
    """
    from understudy.widen import twin_bytes, widen

    if multiple is None:
        multiple, needed = twin_size(model)
    else:
        needed = twin_bytes(model, HIDDEN_MULTIPLE, multiple)
    twin = cache_folder() / f"{model.name}-{fingerprint(model)}-h{HIDDEN_MULTIPLE}-e{multiple}"
    if not twin.is_dir():
        check_disk(twin.parent, needed)
        twin.parent.mkdir(parents=True, exist_ok=True)
        report = bar(f"making a twin of {planning.shown_size(needed)} in {twin.parent}, once")
        widen(model, twin, HIDDEN_MULTIPLE, multiple, report)
    return twin


def twin_size(model: Path) -> tuple[int, int]:
    """How many times wider the experts become, and the bytes of that twin."""
    from understudy.widen import twin_bytes

    one, two = (twin_bytes(model, HIDDEN_MULTIPLE, m) for m in (1, 2))
    multiple = max(1, round((TWIN_BYTES - (2 * one - two)) / (two - one)))  # bytes grow linearly
    return multiple, twin_bytes(model, HIDDEN_MULTIPLE, multiple)


def check_disk(folder: Path, needed: int) -> None:
    """Refuse before the first byte is written."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise NotEnoughDisk(
            f"the twin needs {planning.shown_size(needed)} in {folder}, where "
            f"{planning.shown_size(free)} are free; free some, name another disk in "
            "UNDERSTUDY_CACHE, or use --small"
        )


def fingerprint(model: Path) -> str:
    """Changes when the model is trained again, so that an old twin is never taken for a new one."""
    digest = hashlib.sha256()
    for file in sorted(model.glob("*.safetensors")):
        digest.update(file.read_bytes())
    digest.update((model / "config.json").read_bytes())
    return digest.hexdigest()[:8]


# -------------------------------------------------------------------------------- the comparison


@dataclass(frozen=True, slots=True)
class Outcome:
    """The demo's answer."""

    model: str
    tokens: int
    exact: bool
    expert_bytes: int
    expert_budget_bytes: int
    ttft: dict[str, float]
    rows: list[Row]
    rates: Rates

    def as_dict(self) -> dict[str, Any]:
        """The last line of ``demo --json``."""
        return {
            "model": self.model,
            "tokens": self.tokens,
            "exact": self.exact,
            "expert_bytes": self.expert_bytes,
            "expert_budget_bytes": self.expert_budget_bytes,
            "rows": [self._row(row) for row in self.rows],
        }

    def _row(self, row: Row) -> dict[str, Any]:
        seconds, counters = row.seconds, row.counters
        return {
            "policy": row.policy,
            "tpot_ms": _ms(seconds.median),
            "tpot_min_ms": _ms(seconds.low),
            "tpot_max_ms": _ms(seconds.high),
            "ttft_ms": _ms(self.ttft[row.policy]),
            "bytes_per_token": round(row.bytes),
            "hits": counters.hits,
            "late": counters.late,
            "misses": counters.misses,
            "stall_ms": _ms(row.stall),
            "floor_own_ms": _ms(row.floor_own),
            "floor_belady_ms": _ms(row.floor_belady),
        }


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def budget(model: Path) -> tuple[int, int, int]:
    """(memory, slots, bytes of all experts) at which `RESIDENT_SHARE` of the experts is held."""
    from understudy.engine import inspect

    found = inspect(model)
    everything = found.experts * found.expert_bytes
    slots = int(RESIDENT_SHARE * everything) // found.slot_bytes
    slots = max(planning.MINIMUM_SLOTS, slots)
    beside = found.smallest_memory - planning.MINIMUM_SLOTS * found.slot_bytes
    return beside + slots * found.slot_bytes, slots, everything


def tell(
    model: Path, on_text: Callable[[str], None], on_plan: Callable[[str], None], tokens: int = 96
) -> None:
    """Stream text with `RESIDENT_SHARE` of the experts in memory."""
    from understudy.engine import Engine

    memory, _, _ = budget(model)
    with Engine(model, memory=memory) as engine:
        on_plan(engine.plan.line())
        on_text(OPENING)
        # Sampled: a small model that always takes its favourite word soon repeats itself.
        engine.generate(
            OPENING, max_new_tokens=tokens, temperature=0.7, top_p=0.9, seed=1, on_text=on_text
        )
    on_text("\n")


def compare(
    model: Path, bar: Bar, rounds: int = 5, prompt_tokens: int = 64, new_tokens: int = 33
) -> Outcome:
    """No cache, LRU on demand and Understudy in turns; each against the fully resident run."""
    memory, slots, everything = budget(model)
    texts, resident = fully_resident(model, rounds + 1, prompt_tokens, new_tokens, bar)
    policies = (NO_CACHE, LRU, UNDERSTUDY)
    with bench.open_all(str(model), policies, memory) as engines:
        rates = Rates(next(iter(engines.values())))
        rates.measure()
        label = f"{len(policies)} ways in turns, {rounds} rounds and one to warm up"
        timed = bench.alternate(
            engines, texts, new_tokens, bar(label), rates.measure, keep_logits=True
        )
        rows = [bench.row(n, timed[n], engines[n], rates, Phase.DECODE) for n in engines]
        slot_bytes = engines[UNDERSTUDY.name].plan.slot_bytes
    exact = all(same(resident[1:], timed[policy.name].generations) for policy in policies)
    return Outcome(
        model=model.name,
        tokens=rounds * new_tokens,
        exact=exact,
        expert_bytes=everything,
        expert_budget_bytes=slots * slot_bytes,
        ttft={name: median(g.ttft for g in t.generations) for name, t in timed.items()},
        rows=rows,
        rates=rates,
    )


def fully_resident(
    model: Path, count: int, prompt_tokens: int, new_tokens: int, bar: Bar
) -> tuple[list[list[int]], list[Any]]:
    """The prompts, and what the model answers when every expert is in memory."""
    from understudy.engine import Engine, inspect

    found = inspect(model)
    needed = found.smallest_memory + found.experts * found.slot_bytes
    free = planning.free_memory()
    if needed > free:
        raise UnderstudyError(
            f"the comparison needs {planning.shown_size(needed)} for the fully resident run, and "
            f"{planning.shown_size(free)} are free; try demo --small"
        )
    report = bar("the fully resident run, to compare with")
    with Engine(model, memory=needed, predictor="none") as engine:
        texts = bench.prompts(engine, count, prompt_tokens)
        timed = bench.alternate(
            {"resident": engine}, [texts[0], *texts], new_tokens, report, keep_logits=True
        )
    return texts, timed["resident"].generations


def same(expected: Sequence[Any], got: Sequence[Any]) -> bool:
    """Whether every token and every bit of every logit is equal."""
    return len(expected) == len(got) and all(
        a.tokens == b.tokens
        and len(a.logits) == len(b.logits)
        and all(torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))
        for a, b in zip(expected, got, strict=True)
    )
