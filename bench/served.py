"""``understudy serve`` as a process of its own: start it, wait for it, watch its memory, end it.

Knows: subprocesses, ports, /health, /proc. Does not know: what is asked of the server.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import httpx2

from bench.process import environment
from understudy.core import UnderstudyError

LAST = 4000  # bytes of a log that are shown
COMMAND = ("-m", "understudy", "serve")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Served:
    """One server. A context manager that kills what is still there.

    ``program``: what Python runs, for tests that put something before the command. ``log``: where
    what it says is kept.
    """

    def __init__(
        self,
        model: Path,
        *options: str,
        port: int | None = None,
        program: Sequence[str] = COMMAND,
        log: Path | None = None,
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log.open("w+b") if log else tempfile.TemporaryFile()  # noqa: SIM115 - see exit
        self._child = subprocess.Popen(
            [sys.executable, *program, str(model), "--port", str(self.port), *options],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
        )

    def __enter__(self) -> Served:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()
        self._log.close()

    def wait_until_ready(self, seconds: float = 300.0) -> float:
        """Seconds until /health was green."""
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            if self._child.poll() is not None:
                raise UnderstudyError(
                    f"the server ended with {self._child.returncode}: {self.said}"
                )
            if self.health() == 200:
                return time.monotonic() - began
            time.sleep(0.05)
        raise UnderstudyError(f"the server was not ready after {seconds:.0f} s: {self.said}")

    def health(self) -> int | None:
        """The status of /health; ``None``: nobody answers."""
        try:
            return httpx2.get(f"{self.url}/health", timeout=5.0, trust_env=False).status_code
        except httpx2.HTTPError:
            return None

    @property
    def said(self) -> str:
        """The end of its log."""
        log = self._log.fileno()  # the server writes through the same offset: it must not move
        return os.pread(log, LAST, max(0, os.fstat(log).st_size - LAST)).decode(errors="replace")

    @property
    def resident_bytes(self) -> int:
        """0: it has ended."""
        with suppress(OSError):
            text = Path(f"/proc/{self._child.pid}/status").read_text(encoding="ascii")
            for line in text.splitlines():
                if line.startswith("VmRSS:"):
                    return int(line.split()[1]) * 1024
        return 0

    def terminate(self) -> None:
        """SIGTERM; does not wait."""
        self._child.send_signal(signal.SIGTERM)

    def wait(self, seconds: float = 60.0) -> int:
        """Its exit code."""
        return self._child.wait(seconds)

    def kill(self) -> None:
        """SIGKILL, where it has not ended by itself."""
        if self._child.poll() is None:
            self._child.kill()
        self._child.wait()
