"""Ctrl-C waits for a safe point.

Knows: SIGINT and its handler. Does not know: what is being protected.

Python raises KeyboardInterrupt between any two bytecodes. Between "the slot is reserved" and "the
read is queued" that would lose a slot for good, and no order of the steps closes all such gaps. So
for the length of one event the signal is noted, and delivered at the next safe point.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Deferred:
    """Inside, a Ctrl-C is delivered by `check` or at the end. A second one is not held back: a
    read may hang. Signals reach the main thread only; elsewhere this does nothing."""

    def __init__(self) -> None:
        self._before: Any = None
        self._came: tuple[int, FrameType | None] | None = None

    def __enter__(self) -> Deferred:
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGINT)
            if callable(before):  # not ignored, and not installed by somebody's C code
                signal.signal(signal.SIGINT, self._note)
                self._before = before
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)
            if error is None:
                self.check()

    def check(self) -> None:
        """A safe point: if Ctrl-C came, this is where it arrives."""
        if self._came is not None:
            came, self._came = self._came, None
            self._before(*came)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._came is not None:
            self._before(number, frame)
        self._came = (number, frame)
