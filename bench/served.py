"""``understudy serve`` as a process of its own: start it, wait for it, watch its memory, end it.

Knows: subprocesses, ports, /health, /proc. Does not know: what is asked of the server.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import httpx2
import numpy as np

from bench.process import environment
from understudy.core import UnderstudyError

LAST = 4000  # bytes of a log that are shown
WARM_UP = 0.2  # share of a run, at most `WARM_UP_SECONDS`
WARM_UP_SECONDS = 60.0
WINDOW = 0.1  # share of a run whose median is the first and the last value
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


@dataclass(slots=True)
class Memory:
    """Resident bytes over time."""

    seconds: list[float] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)

    async def watch(self, server: Served) -> None:
        """Until cancelled."""
        began = time.monotonic()
        while True:
            self.seconds.append(time.monotonic() - began)
            self.nbytes.append(server.resident_bytes)
            await asyncio.sleep(0.5)

    def summary(self) -> dict[str, Any]:
        """First and last value after the warm-up, each the median of a window, and the slope."""
        total = self.seconds[-1]
        warm = min(WARM_UP_SECONDS, WARM_UP * total)
        first = self._median(warm, warm + WINDOW * total)
        last = self._median((1 - WINDOW) * total, total)
        at, size = np.array(self.seconds), np.array(self.nbytes)
        slope = np.polyfit(at[at >= warm], size[at >= warm], 1)[0]
        return {
            "warm_up_seconds": round(warm, 1),
            "first_bytes": first,
            "last_bytes": last,
            "peak_bytes": max(self.nbytes),
            "growth": round(last / first - 1, 5),
            "slope_bytes_per_hour": round(3600 * float(slope)),
        }

    def _median(self, start: float, end: float) -> int:
        inside = zip(self.seconds, self.nbytes, strict=True)
        return int(median(size for at, size in inside if start <= at <= end))
