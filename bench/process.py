"""A contestant's process seen from outside: start it, limit it, ask it, end it.

Knows: subprocesses, the protocol of `worker`, memory limits. Does not know: what is asked.
"""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.contestants import CannotRun
from bench.memory_limit import MemoryLimit

ROOT = Path(__file__).resolve().parents[1]


class Process:
    """One worker. A context manager that ends it."""

    def __init__(self, name: str, runner: str, limit: int | None = None) -> None:
        self.name = name
        self._limit = MemoryLimit(name, limit) if limit is not None else None
        try:
            self._child = subprocess.Popen(
                [sys.executable, "-m", "bench.worker", runner],
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            if self._limit is not None:
                self._limit.add(self._child.pid)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def peak_bytes(self) -> int | None:
        """Of the memory cgroup, page cache included; ``None`` without a limit."""
        return None if self._limit is None else self._limit.peak

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its answer. Raises `CannotRun` with the reason."""
        assert self._child.stdin is not None and self._child.stdout is not None
        line = ""
        with suppress(BrokenPipeError):
            print(json.dumps({"do": do, **request}), file=self._child.stdin, flush=True)
            line = self._child.stdout.readline()
        if not line:
            raise CannotRun(self._obituary(do))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise CannotRun(answer["error"])
        return answer

    def _obituary(self, do: str) -> str:
        status = self._child.wait()
        if status == -9 and self._limit is not None:
            return f"the kernel ended it during {do}: it needs more memory than the limit"
        return f"it ended during {do} with status {status}"

    def close(self) -> None:
        child = getattr(self, "_child", None)
        if child is not None:
            with suppress(CannotRun, ValueError):
                self.ask("close")
            for stream in (child.stdin, child.stdout):
                with suppress(OSError):
                    stream.close()
            try:
                child.wait(timeout=10)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        if self._limit is not None:
            self._limit.close()
            self._limit = None


def environment() -> dict[str, str]:
    """This process's, with the packages of this checkout to be found first."""
    import os

    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
