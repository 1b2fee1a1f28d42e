"""Host and device take turns at one model's slots: same bits whoever's turn it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import interpreted  # noqa: F401  before any kernel
import pytest
import torch
from on_a_device import Plain, loaded, say, small
from pretend import Pretend

from understudy import on_device
from understudy.core import Counters, UnderstudyError
from understudy.experts.device.swiglu import Strip, Swiglu, Tiles
from understudy.turns import BLOCK, DEVICE, ENOUGH, HOST, Choice

TRITON = {"device": "pretend", "kernel": "triton"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module", autouse=True)
def pretend() -> Iterator[None]:
    """The device's kernels are the real ones, but for those that compute experts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(on_device.OPENERS, "pretend", lambda asked: Pretend(memory=2 << 30))
        patch.setattr(on_device, "Swiglu", Plain)
        yield


@pytest.fixture(scope="module")
def resident(source: Path, pretend: None) -> Any:
    """What the host answers with everything resident."""
    with loaded(source, **TRITON, decode="host") as model:
        assert model.understudy.policies["frame"] == "recorded"
        assert model.understudy.policies["kernel"] == "triton"
        return say(model)


def test_the_device_answers_as_the_host_does(source: Path, resident: torch.Tensor) -> None:
    """Three requests, with few slots, so that both find what the other has left."""
    with loaded(source, **TRITON, decode="auto", slots=5) as model:
        for _ in range(3):  # host, device, host
            assert torch.equal(say(model), resident)
        model._captured.choice.chosen = DEVICE
        before = model.understudy.counters
        assert torch.equal(say(model), resident)
        counted = model.understudy.counters - before
        assert model.understudy.policies["decode"] == DEVICE
        assert counted.tokens == 4 + 2  # the prompt by the host, two tokens by the device
        assert counted.lookups > 0 and counted.demand_bytes > 0
        model.understudy.runtime.director.book.check_integrity(idle=True)


@pytest.mark.parametrize("evictor", ["lrfu", "lru"])
def test_a_rehearsal_leaves_nobody_in_a_slot_of_somebody_else(
    source: Path, resident: torch.Tensor, evictor: str
) -> None:
    """With room for all, everybody is brought at the start, and the slots change hands."""
    with loaded(source, **TRITON, decode="device", evictor=evictor) as model:
        assert model.understudy.counters == Counters()
        for _ in range(2):
            assert torch.equal(say(model), resident)
        counted = model.understudy.counters
        assert counted.lookups > 0 and counted.misses == 0


def test_with_the_kernels_that_compute_experts(
    source: Path, resident: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles = Tiles(Strip(rows=32, lanes=16), Strip(rows=32, lanes=16))  # few programs
    monkeypatch.setattr(on_device, "Swiglu", lambda *a, **o: Swiglu(*a, **{**o, "tiles": tiles}))
    with loaded(source, **TRITON, decode="device", slots=5) as model:
        torch.testing.assert_close(say(model, 2), resident[:2], atol=1e-5, rtol=1e-5)


def test_the_host_is_not_waited_for_while_the_device_decides(source: Path) -> None:
    with loaded(source, **TRITON, decode="device", slots=5) as model:
        say(model)
        device, step = model.understudy.runtime.transfer.device, model._captured.steps[DEVICE]
        waits, held = device.waits, step.cache
        with step.lend():
            model._captured._to_device()
            handover = device.waits
            held.tokens = 1
            for _ in range(3):
                step({**step._inputs, "past_key_values": held})
            assert device.waits == handover
        assert len(step._graphs) == 1 and waits <= handover


def test_a_recorded_event_is_the_hosts(source: Path, resident: torch.Tensor) -> None:
    """Traces see every event, so nobody else may decide meanwhile."""
    with loaded(source, **TRITON, decode="device", slots=5) as model:
        model.understudy.start_recording()
        assert torch.equal(say(model), resident)
        assert len(model.understudy.stop_recording()) == 2 * 3
        heard: list[Any] = []
        model.understudy.runtime.tap = heard.append
        say(model)
        assert len(heard) == 2 * 3


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"kernel": "torch"}, "needs the triton kernels"),
        ({"memory": "100KiB"}, "all experts in pinned host memory"),
        ({"slots": 2}, "needs 4 expert slots on the device and has 2"),
        ({"frame": "eager"}, "the frame is eager"),
        ({"route": "verified"}, "are the host's"),
    ],
)
def test_what_the_device_cannot_do_is_said(source: Path, options: dict[str, Any], why: str) -> None:
    with pytest.raises(UnderstudyError, match=rf"--decode device is not possible: .*{why}"):
        loaded(source, **{**TRITON, "decode": "device", **options})


def test_an_evictor_that_the_device_does_not_ask_is_told(source: Path) -> None:
    notes: list[str] = []
    asked = {**TRITON, "evictor": "lfu", "on_status": notes.append}
    with loaded(source, **asked, decode="device"):
        assert any("whatever --evictor lfu would say" in note for note in notes)


def test_the_faster_one_stays() -> None:
    for times, faster in (({HOST: 2.0, DEVICE: 1.0}, DEVICE), ({HOST: 1.0, DEVICE: 2.0}, HOST)):
        choice, now, turns = Choice("auto"), 0.0, []
        while choice.chosen is None:
            turns.append(choice.next(now))
            now += times[turns[-1]]
        assert choice.chosen == choice.next(now) == faster
        assert {len(seconds) >= ENOUGH for seconds in choice.seconds.values()} == {True}
        assert turns[:BLOCK] == [HOST] * BLOCK and turns[BLOCK : 2 * BLOCK] == [DEVICE] * BLOCK


def test_short_requests_take_turns_too() -> None:
    choice, now = Choice("auto"), 0.0
    for request in range(60):
        turns = []
        for _ in range(9):
            turns.append(choice.next(now))
            now += 1.0 if turns[-1] == HOST else 3.0
        now += 100.0  # somebody reads the answer: no token took so long
        choice.pause()
        if choice.chosen is None:
            assert set(turns) == {(HOST, DEVICE)[request % 2]}
    assert choice.chosen == HOST
    assert max(map(max, choice.seconds.values())) == 3.0


def test_who_was_asked_for_is_not_timed() -> None:
    assert [Choice(DEVICE).next(0.0), Choice(HOST).next(0.0)] == [DEVICE, HOST]
