"""Greedy answers through seats, without engine and threads: for tests of seats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from understudy.batch import Chunk, Row, Seats


def greedy_alone(model: Any, prompt: Sequence[int], new: int) -> list[int]:
    """What transformers answers by itself, the prompt read whole."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
        do_sample=False, prefill_chunk_size=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    found: list[int] = out[0, len(prompt) :].tolist()
    return found


class Driver:
    """Rows that are answered greedily; who takes part in a step is the test's choice."""

    def __init__(self, seats: Seats) -> None:
        self.seats = seats
        self.rows: list[Row] = []

    def enter(self, prompt: Sequence[int], *, shares_prefix: bool = True) -> Row:
        row = Row(f"row {len(self.rows)}", list(prompt), shares_prefix=shares_prefix)
        self.seats.admit(row)
        assert self.seats.reserve(row, len(row.tokens) - row.done)
        self.rows.append(row)
        return row

    def step(self, counts: dict[Row, int]) -> None:
        """So many tokens of each row; a row that has none left gets its next one."""
        chunks = []
        with torch.inference_mode():
            for row, count in counts.items():
                assert self.seats.reserve(row, count)
                last = row.done + count == len(row.tokens)
                chunks.append(Chunk(row, count, "last" if last else "none"))
            for chunk, logits in zip(chunks, self.seats.forward(chunks), strict=True):
                assert (logits is not None) == (chunk.logits == "last")
                if logits is not None:
                    assert logits.dtype == torch.float32 and len(logits) == 1
                    chunk.row.tokens.append(int(logits[0].argmax()))

    def answer(self, rows: Sequence[Row], new: int) -> None:
        """All of ``rows`` go on together until each has ``new`` more tokens than now."""
        for _ in range(new):
            self.step({row: len(row.tokens) - row.done for row in rows})
