"""Answers become figures, under the names that ``vllm bench serve`` gives them.

Knows: what each key means. Does not know: HTTP, terminals.

A failed request counts in ``failed`` and nowhere else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from understudy.core import UnderstudyError
from understudy.traffic import Answer

METRICS = ("ttft", "tpot", "itl", "e2el")
LATE_SECONDS = 0.05  # a request sent so much after its time was not sent in time


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which figures are asked for. ``goodput``: metric -> the most milliseconds that are good."""

    metrics: tuple[str, ...] = METRICS
    percentiles: tuple[float, ...] = (50, 90, 99)
    goodput: Mapping[str, float] | None = None

    @classmethod
    def parse(cls, metrics: str, percentiles: str, goodput: Sequence[str]) -> Wanted:
        """As typed: ``ttft,tpot``, ``50,99``, ``ttft:500`` (also several, divided by commas)."""
        return cls(_metrics(metrics), _percentiles(percentiles), _goodput(goodput))


def _metrics(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise UnderstudyError(f"no metric {unknown[0]!r}; use {', '.join(METRICS)}")
    return names


def _percentiles(text: str) -> tuple[float, ...]:
    try:
        found = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        found = (-1.0,)
    if not all(0 <= one <= 100 for one in found):
        raise UnderstudyError(f"cannot read {text!r} as percentiles; write 50,90,99")
    return found


def _goodput(texts: Sequence[str]) -> dict[str, float] | None:
    limits: dict[str, float] = {}
    for part in ",".join(texts).replace(" ", ",").split(","):
        name, _, most = part.partition(":")
        if not part:
            continue
        try:
            limits[name] = float(most)
        except ValueError:
            limits[name] = -1.0
        if name not in ("ttft", "tpot", "e2el") or not limits[name] >= 0:
            raise UnderstudyError(
                f"cannot read the goal {part!r}; write ttft:MS, tpot:MS or e2el:MS"
            )
    return limits or None


def figures(answers: Sequence[Answer], seconds: float, wanted: Wanted) -> dict[str, Any]:
    """The result, without what the caller knows better (dates, settings)."""
    good = [answer for answer in answers if answer.error is None]
    read = sum(answer.prompt_tokens for answer in good)
    written = sum(answer.output_tokens for answer in good)
    found: dict[str, Any] = {
        "duration": seconds,
        "completed": len(good),
        "failed": len(answers) - len(good),
        "total_input_tokens": read,
        "total_output_tokens": written,
        "request_throughput": len(good) / seconds,
        "request_goodput": _good_rate(good, seconds, wanted.goodput),
        "output_throughput": written / seconds,
        "total_token_throughput": (read + written) / seconds,
        "late_sends": sum(answer.late > LATE_SECONDS for answer in answers),
        "max_late_ms": 1000 * max((answer.late for answer in answers), default=0.0),
    }
    for metric in wanted.metrics:
        found |= _statistics(metric, _milliseconds(metric, good), wanted.percentiles)
    return found


def _good_rate(
    answers: Sequence[Answer], seconds: float, limits: Mapping[str, float] | None
) -> float | None:
    """Requests per second that meet every goal."""
    if limits is None:
        return None
    met = [
        all(
            max(_milliseconds(name, [answer]), default=0.0) <= most for name, most in limits.items()
        )
        for answer in answers
    ]
    return sum(met) / seconds


def _milliseconds(metric: str, answers: Sequence[Answer]) -> list[float]:
    """One value per answer; of ``itl`` one per gap, of ``tpot`` none where there is no gap."""
    return [1000 * seconds for answer in answers for seconds in _seconds(metric, answer)]


def _seconds(metric: str, answer: Answer) -> Sequence[float]:
    if metric == "itl":
        return answer.gaps
    if metric == "tpot":
        return () if answer.tpot is None else (answer.tpot,)
    return (answer.ttft,) if metric == "ttft" else (answer.e2e,)


def _statistics(
    metric: str, values: Sequence[float], percentiles: Sequence[float]
) -> dict[str, float]:
    """Zeros where there is nothing, as vLLM has them."""
    some = np.array(values or [0.0])
    return {
        f"mean_{metric}_ms": float(some.mean()),
        f"median_{metric}_ms": float(np.median(some)),
        f"std_{metric}_ms": float(some.std()),
        **{f"p{p:g}_{metric}_ms": float(np.percentile(some, p)) for p in percentiles},
    }


def reasons(answers: Sequence[Answer]) -> list[tuple[str, int]]:
    """Why requests failed, the most frequent reason first."""
    return Counter(answer.error for answer in answers if answer.error).most_common()
