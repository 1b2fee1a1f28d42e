"""Both ends are measured as they are: on a device and a processor whose seconds are scripted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.unit.experts.test_kernels import LAYOUT
from tests.unit.experts.test_native import _Module
from understudy import native
from understudy.experts import kernels
from understudy.experts.compute import ExpertMlp
from understudy.experts.device import PinningRefused, ends
from understudy.experts.device.ends import both, host

EXPERT = 8 << 20
SOME_WORK = 20 * EXPERT  # of pinned memory in these tests; real ones take more


@dataclass
class Rates:
    """Bytes/s. ``latency``: seconds of each copy; ``further``: of a further token."""

    link: float = 20e9
    link_beside: float = 16e9
    pageable: float = 5e9
    host: float = 40e9
    host_beside: float = 30e9
    further: float = 400e9
    latency: float = 1e-5


@dataclass
class Mark:
    """An event: so many bytes asked for before it. ``at``: when it was reached."""

    script: Script
    place: float
    at: float | None = None

    def done(self) -> bool:
        return self.at is not None

    def synchronize(self) -> None:
        missing = max(0.0, self.place - self.script.carried)
        self.script.pass_time(missing / self.script.rates.link + 1e-9, busy=False)
        assert self.at is not None

    def seconds_since(self, earlier: Any) -> float:
        assert self.at is not None
        return float(self.at - earlier.at)


@dataclass
class Script:
    """One link and one processor that slow each other down. The device, its stream, its clock."""

    rates: Rates
    index: int = 0
    name: str = "scripted"
    now: float = 0.0
    asked: float = 0.0
    carried: float = 0.0
    marks: list[Mark] = field(default_factory=list)
    pinned: list[torch.Tensor] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    refuses: bool = False
    torch_device = torch.device("cpu")

    def pass_time(self, seconds: float, *, busy: bool) -> None:
        rate = self.rates.link_beside if busy else self.rates.link
        until = self.now + seconds
        for mark in [m for m in self.marks if m.at is None and m.place <= self.asked]:
            needed = max(0.0, mark.place - self.carried) / rate
            if self.now + needed > until:
                break
            self.now, self.carried = self.now + needed, max(self.carried, mark.place)
            mark.at = self.now
        self.carried = min(self.asked, self.carried + (until - self.now) * rate)
        self.now = until

    def clock(self) -> float:
        return self.now

    # the stream

    def copy(self, to: torch.Tensor, source: torch.Tensor) -> None:
        assert to.shape == source.shape
        self.sources.append(source.data_ptr())
        fast = any(_inside(t, p) for t in (to, source) for p in self.pinned)
        self.asked += self.rates.latency * self.rates.link
        if fast:
            self.asked += to.numel()
        else:  # staged by the host, which waits
            self.asked += to.numel() * self.rates.link / self.rates.pageable
            self.record().synchronize()

    def record(self, *, timed: bool = False) -> Mark:
        mark = Mark(self, self.asked)
        self.marks.append(mark)
        self.pass_time(0.0, busy=False)
        return mark

    # the device

    @property
    def compute(self) -> Script:
        return self

    def stream(self, *, urgent: bool = False) -> Script:
        return self

    def allocate(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def pin(self, nbytes: int) -> torch.Tensor:
        if self.refuses:
            raise PinningRefused("the system refuses to pin")
        self.pinned.append(torch.empty(nbytes, dtype=torch.uint8))
        return self.pinned[-1]

    def unpin(self, memory: torch.Tensor) -> None:
        self.pinned = [p for p in self.pinned if p.data_ptr() != memory.data_ptr()]


def _inside(part: torch.Tensor, whole: torch.Tensor) -> bool:
    start = part.data_ptr() - whole.data_ptr()
    return 0 <= start < whole.numel()


class Worker:
    """The processor: slower while the link carries."""

    expert_bytes = EXPERT

    def __init__(self, script: Script) -> None:
        self.script = script
        self.rows: list[int] = []

    def compute(self, rows: int, together: int) -> int:
        self.rows.append(rows)
        script, nbytes = self.script, together * EXPERT
        carrying = script.carried < script.asked
        rate = script.rates.host_beside if carrying else script.rates.host
        seconds = nbytes / rate + (rows - 1) * nbytes / script.rates.further
        script.pass_time(seconds, busy=True)
        return nbytes


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ends, "COLD", SOME_WORK)


def measured(rates: Rates) -> tuple[Script, Any]:
    script = Script(rates)
    return script, both(script, Worker(script), script.clock)  # type: ignore[arg-type]


def test_every_rate_is_found() -> None:
    rates = Rates()
    _, found = measured(rates)
    assert found.host == pytest.approx(rates.host, rel=1e-6)
    assert found.host_further == pytest.approx(rates.further, rel=1e-6)
    # A copy of 8 MiB takes 10 microseconds longer than its bytes do: 2.4 % at 20 GB/s.
    assert found.link == pytest.approx(EXPERT / (EXPERT / rates.link + rates.latency), rel=1e-3)
    assert found.pageable == pytest.approx(rates.pageable, rel=0.02)
    assert found.link_beside == pytest.approx(0.977 * rates.link_beside, rel=0.02)
    assert found.host_beside == pytest.approx(rates.host_beside, rel=0.02)
    assert found.phi == pytest.approx(found.link_beside / (found.link_beside + found.host_beside))
    # Two copies of 8 KiB, each with its latency.
    assert found.handover == pytest.approx(2 * (rates.latency + 8192 / rates.link), rel=0.2)


@pytest.mark.parametrize("slow", ["link", "host"])
def test_rates_are_found_where_one_end_is_much_slower(slow: str) -> None:
    rates = Rates(link=1e9, link_beside=0.9e9) if slow == "link" else Rates(
        host=0.5e9, host_beside=0.4e9
    )  # fmt: skip
    _, found = measured(rates)
    assert found.link_beside == pytest.approx(rates.link_beside, rel=0.05)
    assert found.host_beside == pytest.approx(rates.host_beside, rel=0.05)


def test_further_tokens_that_cost_nothing_are_a_large_number() -> None:
    script = Script(Rates(further=1e30))
    found = host(Worker(script), script.clock)
    assert found.further == pytest.approx(1000 * found.bandwidth)


def test_it_takes_a_second_and_gives_the_memory_back() -> None:
    script, _ = measured(Rates())
    assert script.now < 1.5
    assert not script.pinned


def test_copies_come_from_ever_other_places() -> None:
    script, _ = measured(Rates())
    assert len(set(script.sources)) >= SOME_WORK // EXPERT


def test_refused_memory_is_told_and_nothing_stays_pinned() -> None:
    script = Script(Rates(), refuses=True)
    with pytest.raises(PinningRefused):
        both(script, Worker(script), script.clock)  # type: ignore[arg-type]


# --------------------------------------------------------------------------------- the real worker


def computed(crowd: kernels.Crowd, calls: Sequence[tuple[int, int]]) -> list[int]:
    return [crowd.compute(rows, together) for rows, together in calls]


def test_a_crowd_computes_its_experts_in_turn() -> None:
    crowd = kernels.Crowd(ExpertMlp(_Module()), LAYOUT, torch.bfloat16, most=3)
    assert len(crowd.experts) == 3
    assert crowd.expert_bytes == 3 * 64 * 32 * 2
    seen: list[int] = []
    crowd.mlp = Seeing(seen, crowd)  # type: ignore[assignment]
    assert computed(crowd, [(1, 2), (4, 2)]) == [2 * crowd.expert_bytes] * 2
    assert seen == [0, 1, 2, 0]


class Seeing:
    """Notes which experts are computed."""

    swiglu = False

    def __init__(self, seen: list[int], crowd: kernels.Crowd) -> None:
        self.seen, self.crowd = seen, crowd

    def hidden(self, weights: Any) -> int:
        return 64

    def most_native(self, weights: Any, dtype: torch.dtype) -> int:
        return 0

    def __call__(self, x: torch.Tensor, weights: Any, *, few: bool) -> torch.Tensor:
        self.seen.append(next(i for i, w in enumerate(self.crowd.experts) if w is weights))
        return x


def test_this_processor_computes_a_typical_expert_at_a_finite_rate() -> None:
    crowd = ends.typical(cold_bytes=0)
    assert crowd.expert_bytes == 3 * 2048 * 768 * 2
    found = host(crowd, seconds=0.01)
    assert 1e6 < found.bandwidth < 1e13
    assert found.further > 0


@pytest.mark.parametrize("quicker", [0, kernels.NATIVE_ROWS])
def test_a_typical_expert_is_computed_by_the_quicker_kernel(
    quicker: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if native.library() is None and quicker:
        pytest.skip(f"no kernel: {native.why_not()}")

    def rate(crowd: kernels.Crowd, *how: Any) -> float:
        return -abs(crowd.mlp.native_rows - quicker)

    monkeypatch.setattr(ends, "_rate", rate)
    assert ends.typical(cold_bytes=0).mlp.native_rows == quicker
