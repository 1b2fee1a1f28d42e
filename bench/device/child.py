"""A process in which things are measured: JSON lines in, JSON lines out.

    python -m bench.device.child

    {"do": "prepare", "model": ..., "wanted": {...}, "device": ..., ...}  -> {"facts": {...}}
    {"do": "cell", "percent": ..., "ways": [...], "within": seconds}      -> rows
    {"do": "prefill", "percent": ..., "ways": [...]}                      -> rows
    {"do": "micro", "names": [...], "rates": {...}, "sizes": {...}}       -> figures

Each request is answered by any number of lines, the last of which is {"done": true} or {"error":
"one line"}. {"began": name} says who is about to play, so that the parent knows on whom a process
ended. What libraries print goes to the standard error. Knows: the protocol. Does not know: what a
row means. A device that was lost ends the process: nothing in it can be trusted any more.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from understudy.core import UnderstudyError

Emit = Callable[[dict[str, Any]], None]


@dataclass
class Desk:
    """Answers one request after the other."""

    emit: Emit
    _state: dict[str, Any] = field(default_factory=dict)

    def prepare(
        self, device: str, model: str | None = None, wanted: dict[str, Any] | None = None,
        profile: str | None = None,
    ) -> None:  # fmt: skip
        """Import, and make the model. The device is first touched when something is measured."""
        from bench.device import subjects
        from bench.device.adapter import Spot

        self._state |= {"spot": Spot(device), "profile": profile}
        if model is not None:
            subject = subjects.make(model, subjects.Wanted(**(wanted or {})))
            self._state["subject"] = subject
            self.emit({"facts": subject.facts.as_dict()})

    def cell(
        self, percent: int, ways: list[str], within: float, without: Sequence[str] = ()
    ) -> None:
        from bench.device.play import Table

        until = time.monotonic() + within
        table = self._state.get("table")
        if table is None:
            table = Table(self._state["subject"], self._state["spot"], self._device(), self.emit)
            self._state["table"] = table
        table.without |= set(without)
        table.time_left = lambda: until - time.monotonic()
        table.play(percent, self._ways(ways))

    def prefill(self, percent: int, ways: list[str], tokens: int, rounds: int) -> None:
        from bench.device import prompts

        state = self._state
        prompts.play(
            state["subject"], percent, self._ways(ways), state["spot"], self._device(), self.emit,
            tokens, rounds,
        )  # fmt: skip

    def micro(self, names: list[str], rates: dict[str, float], sizes: dict[str, int]) -> None:
        from bench.device import micro
        from bench.device.play import forget

        device, known = self._device(), dict(rates)
        for name in names:
            self.emit({"began": name})
            try:
                figure = micro.one(name, device, micro.Sizes(**sizes), known)
            except Exception as e:
                traceback.print_exc()
                self.emit({"micro": {"name": name, "rate": None, "skipped": _line(e)}})
                _require(device)
            else:
                known[name] = figure["rate"]
                self.emit({"micro": figure})
            forget(device)

    def _ways(self, names: list[str]) -> list[Any]:
        from bench.device import ways

        found = [way for way in ways.WAYS if way.name in names]
        profile = self._state["profile"]
        trained = self._state["subject"].facts.trained
        return ways.with_profile(found, profile) if profile and trained else found

    def _device(self) -> Any:
        from bench.device.adapter import open_device

        if "device" not in self._state:
            self._state["device"] = open_device(self._state["spot"])
        return self._state["device"]

    def close(self) -> None:
        if "table" in self._state:
            self._state["table"].close()


def _require(device: Any) -> None:
    """That the device, where there is one, still answers."""
    from bench.device.play import DeviceLost

    if device is None:
        return
    try:
        device.compute.record().synchronize()
    except RuntimeError as e:
        raise DeviceLost(_line(e)) from e


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, UnderstudyError) else f"{type(error).__name__}: {text}"


def serve(desk: Desk, requests: TextIO, emit: Emit) -> None:
    """Until the end of the requests."""
    actions: dict[str, Callable[..., None]] = {
        "prepare": desk.prepare, "cell": desk.cell, "prefill": desk.prefill, "micro": desk.micro,
    }  # fmt: skip
    for line in requests:
        request = json.loads(line)
        try:
            actions[request.pop("do")](**request)
        except Exception as e:
            from bench.device.play import DeviceLost

            traceback.print_exc()
            emit({"error": _line(e)})
            if isinstance(e, DeviceLost):
                os._exit(3)  # no destructor may touch the device again
        else:
            emit({"done": True})
    desk.close()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def emit(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    serve(Desk(emit), sys.stdin, emit)


if __name__ == "__main__":
    main()
