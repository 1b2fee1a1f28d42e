"""Calibration text: files read, cut into windows of tokens, some of them held out.

Knows: how windows are drawn and split, what identifies a file. Does not know: models, how a file is
read (`texts`).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy import texts
from understudy.core import UnderstudyError

LETTERS = 12  # per token, more than any text has
EVERY = 5  # one window of so many is held out

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Source:
    """A text and where it comes from. ``digest``: of the file's bytes."""

    name: str
    nbytes: int
    digest: str
    text: str

    @classmethod
    def of(cls, name: str, data: bytes, text: str) -> Source:
        return cls(name, len(data), hashlib.sha256(data).hexdigest()[:16], text)

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "bytes": self.nbytes, "sha256": self.digest}


def read(path: Path) -> Source:
    """A file that `texts.read` can read."""
    text = texts.read(path)
    return Source.of(path.name, path.read_bytes(), text)


# ------------------------------------------------------------------------------------- windows


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of equal length. ``learned``: everything is measured on these; ``chosen`` decide
    whether the estimator is worth asking; what is reported comes from ``reported``."""

    learned: list[list[int]]
    chosen: list[list[int]]
    reported: list[list[int]]

    def tokens(self) -> dict[str, int]:
        parts = {name: getattr(self, name) for name in ("learned", "chosen", "reported")}
        return {name: sum(map(len, part)) for name, part in parts.items()}


def windows(
    encode: Encode, sources: Sequence[Source], tokens: int, length: int, seed: int
) -> Windows:
    """About ``tokens`` tokens, as many of each source as of any other where it has them, in random
    order (or one source would be what is held out)."""
    count = max(1, tokens // length // len(sources))
    found = [w for source in sources for w in _spread(encode, source.text, count, length)]
    if len(found) < 2 * EVERY:
        raise UnderstudyError(
            f"{len(found)} windows of {length} tokens are too few to learn from and to hold some "
            f"out (at least {2 * EVERY}); give more --data, more --tokens or a smaller --window"
        )
    random.Random(seed).shuffle(found)
    held_out = found[EVERY - 1 :: EVERY]
    learned = [w for i, w in enumerate(found) if i % EVERY != EVERY - 1]
    return Windows(learned, held_out[::2], held_out[1::2])


def _spread(encode: Encode, text: str, count: int, length: int) -> list[list[int]]:
    """Up to ``count`` full windows from all over ``text``."""
    piece = LETTERS * length
    if len(text) <= count * piece:
        ids = list(encode(text))
        full = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        return _evenly(full, count)
    starts = [i * (len(text) - piece) // max(1, count - 1) for i in range(count)]
    cut = [_from_a_line(text[start : start + piece]) for start in starts]
    encoded = [list(encode(part))[:length] for part in cut]
    return [ids for ids in encoded if len(ids) == length]


def _from_a_line(text: str) -> str:
    """Without the rest of the line that the cut went through, unless that is most of it."""
    end = text.find("\n", 0, len(text) // 4)
    return text[end + 1 :] if end >= 0 else text


def _evenly(things: list[list[int]], count: int) -> list[list[int]]:
    if len(things) <= count:
        return things
    return [things[i * len(things) // count] for i in range(count)]
