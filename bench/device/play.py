"""A cell: everybody who fits is loaded, then rounds in turns, then what each of them said and took.

Knows: alternation, groups where memory does not hold everybody, what equal answers are. Does not
know: other cells, tables, processes. What goes wrong with one way is its row, not the others'.

The first and the last round are not timed: their logits are kept, and compared bit by bit with
those of the run in which every expert is on the device. What is timed lies between the two. Caches
begin cold, as in the record; only the resident run has read every text once before.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import Any

import torch

from bench.device.adapter import Spot
from bench.device.host_time import host_time, profiled
from bench.device.players import Need, Own, Peer, Player, need, why_not
from bench.device.subjects import Subject
from bench.device.ways import ALL_RESIDENT, EXACT, LOSSY, RESIDENT, Way
from understudy import plan as planning
from understudy.core import UnderstudyError
from understudy.experts.device import Device

Row = dict[str, Any]
Emit = Callable[[Row], None]
# Where the host's time is looked at: at 50 percent, of one way of each kind.
PROFILED_AT, PROFILED = 50, ("device", "lru+hint")
SHORT, LONG = 2, 10  # tokens of the answers that are profiled
# Nobody plays it: its host memory is what the others use.
KEEPER = Way(
    "keeper", "", EXACT,
    {"predictor": "none", "decode": "host", "frame": "eager", "kernel": "torch"}, slots="2k",
)  # fmt: skip


class DeviceLost(Exception):
    """The device answers nothing any more: this process must end."""


# ----------------------------------------------------------------------------------- who fits


def groups(
    needs: Sequence[tuple[Way, Need]], device: int, host: int
) -> tuple[list[list[Way]], list[tuple[Way, str]]]:
    """Ways that fit beside each other into so many bytes, in order; and those that do not fit even
    alone, with the reason."""
    found: list[list[Way]] = []
    refused = []
    room = Need(-1, -1)
    for way, needed in needs:
        for name, bytes_needed, all_of_it in (
            ("device", needed.device, device), ("host", needed.host, host),
        ):  # fmt: skip
            if bytes_needed > all_of_it:
                size = planning.shown_size
                reason = f"needs {size(bytes_needed)} of {name} memory, {size(all_of_it)} are free"
                refused.append((way, reason))
                break
        else:
            if needed.device > room.device or needed.host > room.host:
                found.append([])
                room = Need(device, host)
            found[-1].append(way)
            room = Need(room.device - needed.device, room.host - needed.host)
    return found, refused


# ------------------------------------------------------------------------------- equal answers


@dataclass(frozen=True, slots=True)
class Said:
    """Logits [tokens, vocabulary] of the compared rounds, and the texts they were about."""

    logits: Sequence[torch.Tensor]
    answers: Sequence[Sequence[int]]

    def nll(self) -> float:
        """Nats per token of the dictated text."""
        total = torch.zeros((), dtype=torch.float64)
        for logits, answer in zip(self.logits, self.answers, strict=True):
            chances = logits.double().log_softmax(-1)
            total -= chances.gather(1, torch.tensor(answer)[:, None]).sum()
        return float(total) / sum(map(len, self.answers))

    def equals(self, other: Said) -> str:
        """``yes``: bit by bit. ``tokens``: the same favourite token everywhere. Else ``no``."""
        pairs = list(zip(self.logits, other.logits, strict=True))
        if all(torch.equal(a, b) for a, b in pairs):
            return "yes"
        same = all(torch.equal(a.argmax(-1), b.argmax(-1)) for a, b in pairs)
        return "tokens" if same else "no"


# ---------------------------------------------------------------------------------------- a cell


@dataclass
class Table:
    """Where cells of one subject are played. ``emit`` is told of rows, and of who is about to play;
    ``time_left``, in seconds, is asked before a group is loaded."""

    subject: Subject
    spot: Spot
    device: Device | None
    emit: Emit
    time_left: Callable[[], float] = lambda: inf
    reference: Said | None = None
    without: set[str] = field(default_factory=set)  # resident, keeper: could not be had
    _keeper: Own | None = field(default=None, init=False)
    _longest: float = field(default=0.0, init=False)  # seconds that a group took

    def play(self, percent: int, ways: Sequence[Way]) -> None:
        """Rows of one cell, in groups. The first cell of a subject plays the resident run too."""
        shared = self._keep_host_tier()
        if self.reference is None and RESIDENT not in self.without:
            self._group(100, [ALL_RESIDENT], RESIDENT)
            if self.reference is None:  # nobody is compared
                self.without.add(RESIDENT)
        able = []
        for way in ways:
            reason = why_not(way, self.subject, self.spot)
            if reason:
                self.emit(self._row(way, percent, skipped=reason))
            else:
                able.append(way)
        device, host = self._room()
        needs = [(way, need(way, self.subject.facts, percent, shared)) for way in able]
        fitting, refused = groups(needs, device, host)
        for way, reason in refused:
            self.emit(self._row(way, percent, skipped=reason))
        for number, group in enumerate(fitting):
            if self.time_left() > self._longest:
                self._group(percent, group, f"{percent}/{number}")
            else:
                for way in group:
                    self.emit(self._row(way, percent, skipped="no time was left"))

    def close(self) -> None:
        if self._keeper is not None:
            self._keeper.close()
            self._keeper = None

    def _room(self) -> tuple[int, int]:
        """Free bytes of device and host."""
        free = max(0, planning.free_memory() - planning.RESERVE_BYTES)
        return (free if self.device is None else self.device.free_bytes()), free

    def _keep_host_tier(self) -> bool:
        """One engine that stays, so that the others need not pin all experts again: reading and
        pinning 57 GB takes longer than anything that is measured."""
        if self._keeper is not None or KEEPER.name in self.without or not self.spot.accelerated:
            return self._keeper is not None
        if self.subject.facts.all_expert_bytes < self._room()[1]:
            self.emit({"began": KEEPER.name})
            try:
                self._keeper = Own(self.subject, KEEPER, 0, self.spot, self.device)
            except UnderstudyError:
                traceback.print_exc()  # then each has its own, as far as there is room
                self.without.add(KEEPER.name)
        return self._keeper is not None

    def _open(self, way: Way, percent: int) -> Player:
        if way.peer:
            return Peer(self.subject, percent)
        beside = None if self._keeper is None else self._keeper.engine
        return Own(self.subject, way, percent, self.spot, self.device, beside)

    # ------------------------------------------------------------------------------ one group

    def _group(self, percent: int, ways: Sequence[Way], group: str) -> None:
        started = time.monotonic()
        seats = [Seat(way) for way in ways]
        try:
            with ExitStack() as stack:
                for seat in seats:
                    self.emit({"began": seat.way.name})
                    with self._answering_for(seat):
                        seat.player = self._open(seat.way, percent)
                        stack.callback(seat.close)
                self._rounds(seats)
                for seat in seats:
                    self._finish(seat, percent, group)
        except DeviceLost:
            for seat in seats:  # what was timed before stands
                lost = seat.failed or "the device was lost while another row ran"
                row = self._row(seat.way, percent, group=group, skipped=lost, turns=seat.turns)
                self.emit(row)
            raise
        forget(self.device)
        self._longest = max(self._longest, time.monotonic() - started)

    def _rounds(self, seats: Sequence[Seat]) -> None:
        for seat in seats:
            if seat.way.name == RESIDENT:
                self._warm(seat)
        for number in range(len(self.subject.prompts)):
            for seat in seats:
                self._round(seat, number)

    def _warm(self, seat: Seat) -> None:
        """Everybody whom these texts need is there before anything is timed."""
        for number in range(len(self.subject.prompts)):
            with self._answering_for(seat):
                if seat.player is not None:
                    seat.player.answer(number)

    def _round(self, seat: Seat, number: int) -> None:
        if seat.player is None:
            return
        self.emit({"began": seat.way.name})
        compared = number in (0, len(self.subject.prompts) - 1)
        with self._answering_for(seat):
            found = seat.player.answer(number, keep_logits=compared and not seat.way.peer)
            if not compared:
                seat.turns.append(found.turn.as_dict())
            elif found.logits is not None:
                seat.logits.append(found.logits)
                seat.answers.append(self.subject.answers[number])

    def _finish(self, seat: Seat, percent: int, group: str) -> None:
        """What became of it, as a row."""
        known: Row = {}
        if seat.player is not None:
            known = {"notes": seat.player.notes()}
            said = Said(seat.logits, seat.answers) if len(seat.logits) == 2 else None
            if seat.way.name == RESIDENT:
                self.reference = said
            elif said is not None and self.reference is not None:
                known |= self._compared(said, seat.way)
            looked_at = percent == PROFILED_AT and seat.way.name in PROFILED
            if self.device is not None and looked_at and isinstance(seat.player, Own):
                with self._answering_for(seat):
                    known |= _host_time(seat.player)
        row = self._row(seat.way, percent, group=group, skipped=seat.failed, turns=seat.turns)
        self.emit({**row, **known})

    def _compared(self, said: Said, way: Way) -> Row:
        assert self.reference is not None
        known: Row = {"exact": said.equals(self.reference)}
        if self.subject.facts.trained and way.promise == LOSSY:
            known["delta_nll"] = round(said.nll() - self.reference.nll(), 4)
            known["nll_tokens"] = sum(map(len, said.answers))
        return known

    def _row(self, way: Way, percent: int, **more: Any) -> Row:
        return head_of(self.subject, way, percent) | more

    def _answering_for(self, seat: Seat) -> Responsible:
        return Responsible(seat, self.device)


@dataclass
class Seat:
    """A way and what it has done so far."""

    way: Way
    player: Player | None = None
    failed: str | None = None
    turns: list[Row] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    answers: list[Sequence[int]] = field(default_factory=list)

    def close(self) -> None:
        """Whatever it still holds is given back; that this fails is no news about any row."""
        player, self.player = self.player, None
        if player is not None:
            try:
                player.close()
            except Exception:
                traceback.print_exc()


class Responsible:
    """What goes wrong inside is the seat's reason. A device that answers nothing any more ends all:
    `DeviceLost`."""

    def __init__(self, seat: Seat, device: Device | None) -> None:
        self._seat, self._device = seat, device

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        traceback.print_exception(error)
        self._seat.failed = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        if self._device is not None:
            try:
                self._device.compute.record().synchronize()
            except RuntimeError:
                raise DeviceLost(self._seat.failed) from error
        self._seat.close()
        return True


def forget(device: Device | None) -> None:
    """What engines held is free for the next ones, and for other processes."""
    gc.collect()
    if device is not None:
        device.free_bytes()  # empties torch's own store of free blocks, too


def head_of(subject: Subject, way: Way, percent: int) -> Row:
    """What every row says of itself."""
    return {
        "model": subject.name,
        "budget_fraction": percent / 100,
        "contestant": way.name,
        "promise": way.promise,
        "driven": way.driven,
        "layers": subject.facts.layers,
    }


def _host_time(player: Own) -> Row:
    """By profiling a short answer and a longer one."""
    short, long = (profiled(partial(player.shorter, 1, tokens), tokens) for tokens in (SHORT, LONG))
    return host_time(short, long)
