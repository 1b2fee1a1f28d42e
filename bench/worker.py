"""The process a contestant lives in: JSON lines in, JSON lines out, nothing while it waits.

    python -m bench.worker MODULE:CLASS

    {"do": "imports"}                                                 -> {}
    {"do": "load", "model": ..., "memory": ..., "options": {...}}     -> {"seconds": ..., ...}
    {"do": "round", "prompt": [...], "answer": [...], "seconds": ...} -> a `Lap`
    {"do": "close"}                                                   -> {"rss_bytes": ...}; ends

Whatever goes wrong is answered as {"error": "one line"}. Nothing heavy is imported before the first
request: by then the parent has put this process into its memory cgroup. What libraries print goes
to the standard error. Knows: the protocol. Does not know: contestants.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any, TextIO

from bench.runner import Runner, peak_resident_bytes


class Desk:
    """Answers one request after the other."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._runner: Runner | None = None

    def imports(self) -> dict[str, Any]:
        """Everything that is imported by loading, already now."""
        self._kind().imports()
        return {}

    def _kind(self) -> Any:
        module, _, kind = self._name.partition(":")
        return getattr(import_module(module), kind)

    def load(self, model: str, memory: int | None, options: dict[str, Any]) -> dict[str, Any]:
        runner: Runner = self._kind()()
        started = time.perf_counter()  # imports do not count: they are the same for everybody
        facts = runner.load(model, memory, options)
        self._runner = runner
        return {**facts, "seconds": time.perf_counter() - started}

    def round(self, prompt: list[int], answer: list[int], seconds: float) -> dict[str, Any]:
        if self._runner is None:
            raise RuntimeError("asked for a round before a load")
        lap = self._runner.round(prompt, answer, seconds)
        return {**lap.as_dict(), "rss_bytes": peak_resident_bytes()}

    def close(self) -> dict[str, Any]:
        peak = peak_resident_bytes()
        if self._runner is not None:
            self._runner.close()
        return {"rss_bytes": peak}


def serve(desk: Desk, requests: TextIO, answers: TextIO) -> None:
    """Until ``close`` or the end of the requests."""
    actions: dict[str, Callable[..., dict[str, Any]]] = {
        "imports": desk.imports, "load": desk.load, "round": desk.round, "close": desk.close,
    }  # fmt: skip
    for line in requests:
        request = json.loads(line)
        action = request.pop("do")
        try:
            answer = actions[action](**request)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        print(json.dumps(answer), file=answers, flush=True)
        if action == "close":
            return


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(Desk(sys.argv[1]), sys.stdin, answers)


if __name__ == "__main__":
    main()
