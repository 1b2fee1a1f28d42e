"""Rounds become rows: medians, bytes, floors, ratios. Plain values only.

Knows: what each column means. Does not know: processes, terminals.

A ratio between two contestants is the median of the ratios of their rounds: each round's two were
timed one after the other on the same text.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from bench.contestants import ANCHOR
from bench.match import Entry, Rates, Score


def decode_rows(score: Score, active_bytes: int, model_bytes: int) -> list[dict[str, Any]]:
    """One row per contestant: how fast it writes."""
    return [_row(entry, score, active_bytes, model_bytes, "tpot") for entry in score.entries]


def prefill_rows(score: Score, active_bytes: int, model_bytes: int) -> list[dict[str, Any]]:
    """One row per contestant: how fast it reads the prompt."""
    return [_row(entry, score, active_bytes, model_bytes, "ttft") for entry in score.entries]


def tpot(lap: dict[str, Any]) -> float:
    return lap["seconds"] / lap["steps"] if lap["steps"] else 0.0


def ttft(lap: dict[str, Any]) -> float:
    return float(lap["ttft"])


_CLOCKS = {"tpot": tpot, "ttft": ttft}


def _row(
    entry: Entry, score: Score, active_bytes: int, model_bytes: int, clock: str
) -> dict[str, Any]:
    head = {
        "model": score.cell.model,
        "budget_fraction": score.cell.fraction,
        "contestant": entry.contestant.name,
        "format": entry.contestant.format,
        "group": entry.group,
        "skipped": entry.skipped,
    }
    if not entry.laps:
        return {**head, "skipped": entry.skipped or "no round was counted"}
    measured = _decode(entry, score.rates, active_bytes, model_bytes)
    if clock == "ttft":
        measured = _prefill(entry, score)
    return {
        **head,
        "rounds": len(entry.laps),
        **measured,
        "rss_bytes": entry.rss_bytes,
        "cgroup_peak_bytes": entry.group_peak_bytes,
        "load_seconds": round(entry.facts.get("seconds", 0.0), 3),
        "slots": entry.facts.get("slots"),
        "experts": entry.facts.get("experts"),
        "policies": entry.facts.get("policies"),
        "against": _against(entry, score.entries, clock),
    }


def _decode(entry: Entry, rates: Rates, active_bytes: int, model_bytes: int) -> dict[str, Any]:
    laps = entry.laps
    steps = sum(lap["steps"] for lap in laps) or 1
    needed, best = _total(laps, "needed_bytes"), _total(laps, "best_bytes")
    memory = _total(laps, "memory_bytes")
    if memory is None:  # it must read its share of the weights, whatever it does
        memory = active_bytes * entry.file_bytes / model_bytes * steps
    own = None if needed is None else rates.floor(needed / steps, memory / steps)
    belady = None if best is None else rates.floor(best / steps, memory / steps)
    times = [tpot(lap) for lap in laps]
    lookups = _total(laps, "lookups")
    return {
        "steps": steps // len(laps),
        "tpot_ms": _ms(median(times)),
        "tpot_min_ms": _ms(min(times)),
        "tpot_max_ms": _ms(max(times)),
        "ttft_ms": _ms(median(ttft(lap) for lap in laps)),
        "bytes_per_token": _each(_total(laps, "read_bytes"), steps),
        "hit_rate": _share(_total(laps, "hits"), lookups),
        "late_rate": _share(_total(laps, "late"), lookups),
        "stall_ms": _ms_each(_total(laps, "stall_seconds"), steps),
        "floor_own_ms": _ms(own),
        "floor_belady_ms": _ms(belady),
        "over_floor_own": _over(median(times), own),
        "over_floor_belady": _over(median(times), belady),
        "missed_over_belady": _over(needed, best),
    }


def _prefill(entry: Entry, score: Score) -> dict[str, Any]:
    laps, count = entry.laps, len(entry.laps)
    times = [ttft(lap) for lap in laps]
    read, once = _total(laps, "prompt_read_bytes"), _total(laps, "prompt_once_bytes")
    own = None if read is None else score.rates.floor(read / count, 0.0)
    return {
        "prompt_tokens": score.prompt_tokens,
        "tokens_per_second": round(score.prompt_tokens / median(times), 2),
        "ttft_ms": _ms(median(times)),
        "ttft_min_ms": _ms(min(times)),
        "ttft_max_ms": _ms(max(times)),
        "bytes_read": _each(read, count),
        "bytes_once": _each(once, count),
        "read_over_once": _over(read, once),
        "stall_ms": _ms_each(_total(laps, "prompt_stall_seconds"), count),
        "floor_own_ms": _ms(own),
        "over_floor_own": _over(median(times), own),
    }


def _against(entry: Entry, entries: Sequence[Entry], clock: str) -> dict[str, float]:
    """Of the anchor and our own: own time / the other's, for everybody who alternated with it."""
    if not entry.contestant.own:
        anchors = [one for one in entries if one.contestant.name == ANCHOR]
        others = [one for one in anchors if one.group == entry.group]
    else:
        others = [one for one in entries if one.group == entry.group and one is not entry]
    return {
        other.contestant.name: ratio(entry, other, clock)
        for other in others
        if other.laps and not other.skipped
    }


def ratio(entry: Entry, other: Entry, clock: str) -> float:
    """Median over the rounds of own time / the other's."""
    time = _CLOCKS[clock]
    pairs = zip(entry.laps, other.laps, strict=False)
    found = [time(mine) / time(theirs) for mine, theirs in pairs if time(theirs)]
    return round(median(found), 4) if found else 0.0


# ------------------------------------------------------------------------------------- arithmetic


def _total(laps: Sequence[dict[str, Any]], key: str) -> float | None:
    """Sum over rounds; ``None`` where the contestant cannot say."""
    values = [lap[key] for lap in laps]
    return None if any(value is None for value in values) else sum(values)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 3)


def _ms_each(seconds: float | None, count: int) -> float | None:
    return None if seconds is None else _ms(seconds / count)


def _each(total: float | None, count: int) -> int | None:
    return None if total is None else round(total / count)


def _share(part: float | None, whole: float | None) -> float | None:
    return round(part / whole, 4) if part is not None and whole else None


def _over(value: float | None, floor: float | None) -> float | None:
    return round(value / floor, 3) if value is not None and floor else None
