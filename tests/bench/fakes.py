"""Contestants made of nothing, run by the real worker in real processes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from bench.runner import Lap, step_through


class Counting:
    """Answers each token with the next number; sleeps as long as it is told."""

    @staticmethod
    def imports() -> None: ...

    def load(self, model: str, memory: int | None, options: dict[str, Any]) -> dict[str, Any]:
        print("a library that talks")  # must not reach the protocol
        self.pause = float(options.get("pause", 0))
        return {"said": [f"{model} with {memory}"]}

    def round(self, prompt: Sequence[int], answer: Sequence[int], seconds: float) -> Lap:
        def step(token: int) -> int:
            time.sleep(self.pause)
            return token + 1

        return step_through(lambda tokens: tokens[-1] + 1, step, prompt, answer, seconds)

    def close(self) -> None: ...


class Failing(Counting):
    def round(self, prompt: Sequence[int], answer: Sequence[int], seconds: float) -> Lap:
        raise ValueError("no such\ntoken")


class Greedy(Counting):
    """Wants more memory than it is given."""

    def round(self, prompt: Sequence[int], answer: Sequence[int], seconds: float) -> Lap:
        self.hoard = bytearray(b"x") * (256 << 20)
        return super().round(prompt, answer, seconds)
