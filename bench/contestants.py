"""Who runs in a benchmark: one process each, driven by lines of JSON.

Knows: how a contestant is started (in a cgroup or not), asked and stopped. Does not know: cells,
floors, tables. What a contestant does with a request stands in `bench.worker`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.limits import Group

REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Contestant:
    """``kind``: the loader in `bench.worker`; ``format``: of its expert weights; ``options``: for
    the loader. ``engine``: whether it is ours, and so counts hits, stalls and misses."""

    name: str
    kind: str
    format: str = "bf16"
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        return self.kind == "understudy"


UNDERSTUDY = Contestant("understudy", "understudy")
NO_PREFETCH = Contestant("understudy-noprefetch", "understudy", options={"predictor": "none"})
LLAMA = {f: Contestant(f"llama.cpp-{f}", "llama", f, {"gguf": f}) for f in ("bf16", "q8_0", "q4_0")}
PACKED = {f: Contestant(f"understudy-{f}", "understudy", f, {"pack": f}) for f in ("int8", "int4")}
ACCELERATE = Contestant("accelerate", "accelerate")
TRANSFORMERS = Contestant("transformers", "transformers")

EVERYBODY = {
    c.name: c
    for c in (
        UNDERSTUDY, NO_PREFETCH, LLAMA["bf16"], PACKED["int8"], LLAMA["q8_0"], PACKED["int4"],
        LLAMA["q4_0"], TRANSFORMERS, ACCELERATE,
    )
}  # fmt: skip
IN_RAM = [name for name in EVERYBODY if name not in ("understudy-noprefetch", "accelerate")]
LIMITED = ["understudy", "understudy-noprefetch", "llama.cpp-bf16", "accelerate"]
PEERLESS = ["understudy", "understudy-noprefetch"]


class Gone(Exception):
    """A contestant ended or could not begin; the text is its last line."""


class Running:
    """A contestant's process. ``ask`` sends one request and waits for its answer."""

    def __init__(self, contestant: Contestant, model: Path, memory: int | None,
                 group: Group | None) -> None:  # fmt: skip
        self.contestant, self.group = contestant, group
        settings = json.dumps({"model": str(model), "memory": memory, **contestant.options})
        command = [sys.executable, "-m", "bench.worker", contestant.kind, settings]
        if group is not None:
            command = ["sh", "-c", f'{group.enter} && exec "$0" "$@"', *command]
        self.process = subprocess.Popen(
            command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.card = self._answer()

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # its last line says why
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        """The next line that is ours: libraries print where they like."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith('{"understudy-bench":'):
                answer: dict[str, Any] = json.loads(line)["understudy-bench"]
                if "error" in answer:
                    raise Gone(answer["error"])
                return answer
        raise Gone(self._last_words())

    def _last_words(self) -> str:
        assert self.process.stderr is not None
        code = self.process.wait()
        lines = [line for line in self.process.stderr.read().splitlines() if line.strip()]
        killed = "killed: out of memory inside its limit" if code in (-9, 137) else f"exit {code}"
        return f"{killed}{': ' + lines[-1][:160] if lines and code != -9 else ''}"

    def stop(self) -> None:
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def named(names: Sequence[str]) -> list[Contestant]:
    unknown = [name for name in names if name not in EVERYBODY]
    if unknown:
        raise SystemExit(f"no contestant {unknown[0]!r}; known: {', '.join(EVERYBODY)}")
    return [EVERYBODY[name] for name in names]
