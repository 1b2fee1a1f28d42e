"""Who asks for how much, and when: from a trace of arrivals, or drawn at random.

Knows: lengths, times, the Azure format of a trace, real text cut into prompts. Does not know: HTTP.

Every draw comes from one seeded generator, so a seed names a workload.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from math import isinf
from pathlib import Path
from random import Random

from understudy.core import UnderstudyError
from understudy.traffic import Request

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def from_trace(
    path: Path, count: int, time_scale: float = 1.0, length_scale: float = 1.0
) -> list[Request]:
    """The first ``count`` requests of an Azure LLM inference trace.

    ``time_scale`` 10: ten times slower. ``length_scale`` 0.1: a tenth of the tokens, at least one.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            found = list(_rows(path, file, count))
    except OSError as e:
        raise UnderstudyError(f"cannot read {path}: {e.strerror}; name another file") from e
    except UnicodeDecodeError as e:
        raise UnderstudyError(f"{path} is no text in UTF-8; name another file") from e
    if not found:
        raise UnderstudyError(f"{path} holds no requests; name another file")
    first = min(at for at, _, _ in found)
    scaled = [
        Request((at - first) * time_scale, _scaled(read, length_scale), _scaled(new, length_scale))
        for at, read, new in found
    ]
    return sorted(scaled, key=lambda request: request.at)


def _rows(path: Path, file: Iterator[str], count: int) -> Iterator[tuple[float, int, int]]:
    lines = csv.DictReader(file)
    if not set(COLUMNS) <= set(lines.fieldnames or ()):
        raise UnderstudyError(f"{path} has no columns {', '.join(COLUMNS)}; name another file")
    for number, line in zip(range(2, count + 2), lines, strict=False):
        try:
            at, read, new = (line[column] for column in COLUMNS)
            yield datetime.fromisoformat(at).timestamp(), int(read), int(new)
        except (TypeError, ValueError):
            raise UnderstudyError(
                f"{path}: line {number} is not a time and two numbers of tokens; repair it"
            ) from None


def _scaled(tokens: int, scale: float) -> int:
    return max(1, round(tokens * scale))


def of_random_length(
    count: int, prompt_tokens: int, output_tokens: int, spread: float, random: Random
) -> list[Request]:
    """Lengths evenly from (1 - spread) to (1 + spread) times the mean; all at once."""

    def drawn(mean: int) -> int:
        return max(1, random.randint(round(mean * (1 - spread)), round(mean * (1 + spread))))

    return [Request(0.0, drawn(prompt_tokens), drawn(output_tokens)) for _ in range(count)]


def at_rate(
    requests: Sequence[Request], rate: float, burstiness: float, random: Random
) -> list[Request]:
    """The same requests, ``rate`` of them per second (infinite: all at once). Gaps are drawn from a
    gamma distribution: ``burstiness`` 1 is Poisson, less comes in bursts, more is more even."""
    if isinf(rate):
        return [replace(request, at=0.0) for request in requests]
    at, timed = 0.0, []
    for request in requests:
        at += random.gammavariate(burstiness, 1 / (rate * burstiness))
        timed.append(replace(request, at=at))
    return timed


def clip(requests: Sequence[Request], longest: int) -> tuple[list[Request], int]:
    """Requests that a context of ``longest`` tokens holds, and how many had to be cut. An answer
    may take half of it; what is then left is the prompt's."""
    cut = [_cut(request, longest) for request in requests]
    return cut, sum(a != b for a, b in zip(cut, requests, strict=True))


def _cut(request: Request, longest: int) -> Request:
    if request.prompt_tokens + request.output_tokens <= longest:
        return request
    answer = min(request.output_tokens, longest // 2)
    prompt = min(request.prompt_tokens, longest - answer)
    return replace(request, prompt_tokens=prompt, output_tokens=answer)


class Prompts:
    """Prompts of a wanted length out of one long text, each from another place.

    ``shuffled``: the text's tokens in random order, so that nothing of the text is left but the
    frequency of its tokens.
    """

    def __init__(self, ids: Sequence[int], random: Random, shuffled: bool = False) -> None:
        self._ids, self._random, self._shuffled = list(ids), random, shuffled

    def take(self, length: int) -> list[int]:
        if self._shuffled:
            return self._random.choices(self._ids, k=length)
        start = self._random.randrange(len(self._ids))
        piece = self._ids[start : start + length]
        while len(piece) < length:
            piece += self._ids[: length - len(piece)]
        return piece
