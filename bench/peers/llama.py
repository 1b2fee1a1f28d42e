"""llama.cpp through its Python package: memory-mapped weights, as most people run it.

Knows: llama-cpp-python. Does not know: how the GGUF file came about (`gguf_file`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np

from bench.runner import Lap, step_through

CONTEXT = 1024
BATCH = 512


class Llama:
    """``options``: ``threads``; default, one per core."""

    @staticmethod
    def imports() -> None:
        """Nothing that importing this file has not imported."""

    def load(self, model: str, memory: int | None, options: dict[str, Any]) -> dict[str, Any]:
        del memory  # it cannot be told; the cgroup tells it
        threads = options.get("threads") or len(os.sched_getaffinity(0))
        self.llama = llama_cpp.Llama(
            model,
            n_ctx=CONTEXT,
            n_batch=BATCH,
            n_ubatch=BATCH,
            n_threads=threads,
            n_threads_batch=threads,
            use_mmap=True,
            verbose=False,
        )
        return {"said": [llama_cpp.llama_print_system_info().decode()], "threads": threads}

    def round(self, prompt: Sequence[int], answer: Sequence[int], seconds: float) -> Lap:
        self.llama.reset()
        return step_through(self._read, lambda token: self._read([token]), prompt, answer, seconds)

    def _read(self, tokens: Sequence[int]) -> int:
        self.llama.eval(tokens)
        logits = llama_cpp.llama_get_logits_ith(self.llama.ctx, -1)
        return int(np.ctypeslib.as_array(logits, shape=(self.llama.n_vocab(),)).argmax())

    def close(self) -> None:
        self.llama.close()
