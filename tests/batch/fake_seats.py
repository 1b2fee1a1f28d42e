"""Seats without a model: room is counted exactly, and every step is kept for the test to see.

The next token is a function of all tokens before it, so that an answer tells whether the seats were
handed the right ones; a row that is asked about tokens that were never done is an error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from understudy.batch import Chunk, Row

VOCABULARY = 50


def next_token(tokens: Sequence[int]) -> int:
    return (sum((i + 1) * t for i, t in enumerate(tokens)) * 7 + len(tokens)) % VOCABULARY


class FakeSeats:
    """``fail``: raised by the next step."""

    prefix_sharing = False

    def __init__(self, capacity: int = 1000, *, whole_prompts: bool = False) -> None:
        self.capacity, self.whole_prompts = capacity, whole_prompts
        self.held: dict[Row, int] = {}
        self.steps: list[list[tuple[str, int, str]]] = []
        self.fail: BaseException | None = None
        self.closed = False

    def admit(self, row: Row) -> int:
        assert row not in self.held
        self.held[row], row.done = 0, 0
        return 0

    def reserve(self, row: Row, count: int) -> bool:
        more = max(0, row.done + count - self.held[row])
        if self.used + more > self.capacity:
            return False
        self.held[row] += more
        return True

    def release(self, row: Row) -> None:
        if self.held.pop(row, None) is not None:
            row.done = 0

    @property
    def used(self) -> int:
        return sum(self.held.values())

    def forward(self, chunks: Sequence[Chunk]) -> list[torch.Tensor | None]:
        self.steps.append([(c.row.id, c.count, c.logits) for c in chunks])
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        return [self._logits(chunk) for chunk in chunks]

    def _logits(self, chunk: Chunk) -> torch.Tensor | None:
        row = chunk.row
        first, row.done = row.done, row.done + chunk.count
        assert row.done <= self.held[row] and row.done <= len(row.tokens)
        if chunk.logits == "none":
            return None
        ends = range(first + 1 if chunk.logits == "all" else row.done, row.done + 1)
        out = torch.zeros(len(ends), VOCABULARY)
        for i, end in enumerate(ends):
            out[i, next_token(row.tokens[:end])] = 5.0
        return out

    def close(self) -> None:
        self.closed = True
