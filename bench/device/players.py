"""One way of running a model, ready to be asked for answers.

Knows: how each is loaded, and what memory it takes. Does not know: rounds, who else plays, what is
made of the answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

from bench.device import adapter
from bench.device.adapter import Answer, Spot
from bench.device.figures import Facts, Turn
from bench.device.subjects import Subject
from bench.device.ways import Way
from understudy.core import UnderstudyError
from understudy.experts.device import Device

PEER_SECONDS = 1.5  # of decoding per round: it can stop early, and is slow


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes. ``host``: of memory, beside what is shared."""

    device: int
    host: int


class Player(Protocol):
    def answer(self, number: int, keep_logits: bool = False) -> Answer:
        """To prompt ``number`` of the subject."""

    def notes(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


def slots_of(way: Way, facts: Facts, percent: int) -> int:
    """On the device."""
    if way.slots is None:
        return facts.experts * percent // 100
    if way.slots.endswith("k"):
        return int(way.slots[:-1]) * facts.top_k
    return facts.experts * int(way.slots[:-1]) // 100


def need(way: Way, facts: Facts, percent: int, shared: bool) -> Need:
    """``shared``: somebody's host tier is there to be used."""
    held = slots_of(way, facts, percent) * facts.expert_bytes + facts.resident_bytes
    return Need(held + adapter.HEADROOM, 0 if shared else facts.all_expert_bytes)


def why_not(way: Way, subject: Subject, spot: Spot) -> str | None:
    """Why this way cannot be gone here."""
    if not way.peer:
        return adapter.lacking(way, spot)
    if subject.folder is None:
        return "cannot load a checkpoint whose experts share one file"
    if not spot.accelerated:
        return "needs an accelerator"
    return None if find_spec("accelerate") else "accelerate is not installed"


class Own:
    """An engine of ours."""

    def __init__(
        self, subject: Subject, way: Way, percent: int, spot: Spot, device: Device | None,
        beside: Any = None, **settings: Any,
    ) -> None:  # fmt: skip
        self.subject, self.device = subject, device
        self.slots = slots_of(way, subject.facts, percent)
        self.said: list[str] = []
        self.engine = adapter.open_engine(
            subject.source,
            way,
            spot,
            slots=self.slots,
            need=self.slots * subject.facts.expert_bytes + subject.facts.resident_bytes,
            beside=beside,
            on_status=self.said.append,
            **{**subject.settings, **settings},
        )
        if (held := self.engine.plan.slots) < self.slots:  # caches of different sizes say nothing
            self.engine.close()
            raise UnderstudyError(f"the device holds {held} of the {self.slots} slots of this cell")

    def answer(self, number: int, keep_logits: bool = False) -> Answer:
        self.subject.before(self.engine, number)
        prompt, dictated = self.subject.prompts[number], self.subject.answers[number]
        return adapter.answer(self.engine, self.device, prompt, dictated, keep_logits)

    def shorter(self, number: int, tokens: int) -> None:
        """The same, cut after ``tokens`` tokens."""
        self.subject.before(self.engine, number)
        prompt, dictated = self.subject.prompts[number], self.subject.answers[number]
        adapter.answer(self.engine, None, prompt, dictated[:tokens])

    def notes(self) -> dict[str, Any]:
        return {"slots": self.slots, "said": self.said, **adapter.notes(self.engine)}

    def close(self) -> None:
        self.engine.close()


class Peer:
    """accelerate, told to use as much of the device as the others."""

    def __init__(self, subject: Subject, percent: int) -> None:
        from bench.peers.plain import Offloaded

        facts = subject.facts
        self.subject = subject
        budget = facts.resident_bytes + facts.all_expert_bytes * percent // 100
        self.runner = Offloaded()
        self.runner.load(str(subject.folder), budget, {})

    def answer(self, number: int, keep_logits: bool = False) -> Answer:
        prompt, dictated = self.subject.prompts[number], self.subject.answers[number]
        lap = self.runner.round(prompt, dictated, PEER_SECONDS)
        copied = self.runner.copied_bytes
        turn = Turn(
            steps=lap.steps,
            seconds=lap.seconds,
            ttft=lap.ttft,
            read_bytes=copied * lap.steps,
            needed_bytes=copied * lap.steps,
            prompt_bytes=copied,
        )
        return Answer(turn, None)

    def notes(self) -> dict[str, Any]:
        return {"copied_bytes": self.runner.copied_bytes}

    def close(self) -> None:
        self.runner.close()
