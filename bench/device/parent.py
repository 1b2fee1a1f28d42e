"""Children seen from outside: start them, ask them, end them, and go on when one is gone.

Knows: subprocesses, the protocol of `child`, whom to blame when a process ends. Does not know: what
a row means, time budgets, tables.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
Message = dict[str, Any]
COMMAND = (sys.executable, "-m", "bench.device.child")


class Lost(Exception):
    """The child ended, or did not answer in time and was ended."""


class Refused(Exception):
    """The child says why it cannot; it is still there."""


class Child:
    """One process. What it prints beside its answers goes to ``log``."""

    def __init__(self, log: Path, command: Sequence[str] = COMMAND) -> None:
        self.log = log
        paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        with log.open("ab") as written:
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=written,
                text=True,
            )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def ask(self, do: str, seconds: float, **request: Any) -> Iterator[Message]:
        """What it answers, up to its last word. Raises `Lost`, `Refused`."""
        self.send(do, **request)
        return self.answers(do, seconds)

    def send(self, do: str, **request: Any) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            print(json.dumps({"do": do, **request}), file=self._process.stdin, flush=True)

    def answers(self, do: str, seconds: float) -> Iterator[Message]:
        until = time.monotonic() + seconds
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                self.end()
                raise Lost(f"it did not answer {do} within {seconds:.0f} s") from None
            if line is None:
                status = self._process.wait()
                raise Lost(f"it ended with status {status} during {do}; see {self.log}")
            message: Message = json.loads(line)
            if "done" in message:
                return
            if "error" in message:
                raise Refused(message["error"])
            yield message

    def end(self) -> None:
        """Now, whatever it does."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """It may give everything back by itself; it has nothing to keep."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.end()


class Shift:
    """One kind of work, in one child after another: if one ends, the next goes on without whoever
    was playing then."""

    MOST_LOSSES = 3  # of one request

    def __init__(self, prepare: Message, seconds: float, start: Callable[[], Child]) -> None:
        self._prepare, self._seconds, self._start = prepare, seconds, start
        self._child: Child | None = None
        self._ready = False

    def begin(self) -> None:
        """Start preparing, without waiting."""
        self._child, self._ready = self._start(), False
        self._child.send("prepare", **self._prepare)

    def prepared(self) -> list[Message]:
        """Wait until it is. Raises `Lost`, `Refused`."""
        if self._child is None:
            self.begin()
        assert self._child is not None
        if self._ready:
            return []
        found = list(self._child.answers("prepare", self._seconds))
        self._ready = True
        return found

    def carry_out(
        self, do: str, key: str, names: Sequence[str], seconds: Callable[[], float],
        tell: Callable[[Message], str | None], **request: Any,
    ) -> dict[str, str]:  # fmt: skip
        """Ask for all of ``names``, passed as ``key``. ``tell`` gets each message and says whom of
        the names it finishes. Returns name -> why it was not finished."""
        todo, failed, began = list(names), dict[str, str](), ""
        losses = 0
        while todo and losses < self.MOST_LOSSES:
            try:
                self.prepared()
                assert self._child is not None
                for message in self._child.ask(do, seconds(), **{key: todo}, **request):
                    began = message.get("began", began)
                    finished = tell(message)
                    todo = [name for name in todo if name != finished]
                break
            except Refused as e:
                return failed | dict.fromkeys(todo, str(e))
            except Lost as e:
                losses += 1
                self._child = None
                blamed = began if began in todo else ""
                if blamed:
                    failed[blamed] = str(e)
                    todo.remove(blamed)
                elif began and began not in names:  # it is nobody's row, but was in the way
                    request["without"] = [*request.get("without", ()), began]
                if seconds() <= 0:
                    return failed | dict.fromkeys(todo, "no time was left")
        return failed | dict.fromkeys(todo, "it was not answered")

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None
