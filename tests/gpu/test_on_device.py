"""A whole model on a real device: the same bits whatever is resident and whoever decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from on_a_device import loaded, say, small

from understudy.core import BudgetTooSmall

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here"),
]

STEPS = 12


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp(str(request.param).removeprefix("torch.")), request.param)


def answer(source: Path, **options: Any) -> torch.Tensor:
    with loaded(source, device="cuda", device_memory="2GiB", **options) as model:
        first = say(model, STEPS)
        assert torch.equal(say(model, STEPS), first)
        return first


@pytest.mark.parametrize("kernel", ["triton", "torch"])
@pytest.mark.parametrize("frame", ["auto", "eager"])
def test_bits_do_not_depend_on_the_slots(source: Path, kernel: str, frame: str) -> None:
    resident = answer(source, kernel=kernel, frame=frame, decode="host")
    for slots in (2, 5):
        found = answer(source, kernel=kernel, frame=frame, decode="host", slots=slots)
        assert torch.equal(found, resident)


def test_bits_do_not_depend_on_who_decides(source: Path) -> None:
    resident = answer(source, kernel="triton", decode="host")
    for slots in (8, 5):
        for decode in ("device", "auto"):
            found = answer(source, kernel="triton", decode=decode, slots=slots)
            assert torch.equal(found, resident)


def test_the_cpu_agrees(source: Path) -> None:
    with loaded(source) as model:
        expected = say(model, 1)
    close = 1e-4 if model.dtype == torch.float32 else 5e-2
    for kernel in ("triton", "torch"):
        torch.testing.assert_close(
            answer(source, kernel=kernel)[:1], expected, atol=close, rtol=close
        )


def test_checked_slots(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resident = answer(source, decode="host")
    monkeypatch.setenv("UNDERSTUDY_CHECK", "1")
    for decode in ("host", "device"):
        assert torch.equal(answer(source, decode=decode, slots=5), resident)


def test_disk_beneath_host_memory(source: Path) -> None:
    resident = answer(source, decode="host")
    memory = "64KiB" if source.name.startswith("float32") else "40KiB"  # four staging slots, and 2+
    with loaded(source, memory, device="cuda", device_memory="2GiB", slots=3) as model:
        assert model.understudy.policies["host_experts"] != "8 of 8"
        assert torch.equal(say(model, STEPS), resident)


def test_a_budget_that_is_too_small(source: Path) -> None:
    with pytest.raises(BudgetTooSmall, match="--device-memory"):
        loaded(source, device="cuda", device_memory="64KiB")
