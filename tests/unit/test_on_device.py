"""A model whose experts are computed on a device: same bits whatever is resident, no race, faults.

No accelerator is needed: the device is pretended, its copies happen late, and a missing fence is
an error (`tests/pretend`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import configs
from pretend import Pretend

import understudy
from understudy import on_device
from understudy.core import BudgetTooSmall, ReadFailed, UnderstudyError
from understudy.engine import Engine

PROMPT = [5, 17, 3, 44, 60, 2, 9, 31, 8, 77, 12]
STEPS = 12


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``pretend(...)``: from now on ``device="pretend"`` is a `Pretend` made with these."""

    def choose(**settings: Any) -> None:
        monkeypatch.setitem(on_device.OPENERS, "pretend", lambda asked: Pretend(**settings))

    choose()
    return choose


def answer(source: Path, **options: Any) -> tuple[torch.Tensor, Any]:
    """[steps, vocabulary] logits of a greedy answer, and what was counted."""
    with Engine(source, max_context=64, **{"memory": "1GiB", **options}) as engine:
        found = engine.generate(PROMPT, max_new_tokens=STEPS, keep_logits=True)
        engine.model.understudy.runtime.transfer.settle()
        engine.model.understudy.runtime.director.book.check_integrity(idle=True)
        assert found.logits is not None
        return torch.stack(found.logits), found


def test_a_device_answers_what_the_cpu_answers(tiny: Any, pretend: Any) -> None:
    on_cpu, _ = answer(tiny("qwen3_moe", "float32"))
    on_device, _ = answer(tiny("qwen3_moe", "float32"), device="pretend")
    assert torch.equal(on_cpu.argmax(-1), on_device.argmax(-1))
    torch.testing.assert_close(on_cpu, on_device, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("predictor", ["none", "next-gate"])
def test_bits_do_not_depend_on_the_slots(
    tiny: Any, pretend: Any, family: str, dtype: str, predictor: str
) -> None:
    source = tiny(family, dtype)
    resident, _ = answer(source, device="pretend")
    for seed, slots in enumerate((2, 3, 5, 9, 17)):
        pretend(seed=seed)
        found, said = answer(
            source, device="pretend", slots=slots, predictor=predictor, self_switch=False
        )
        assert torch.equal(found, resident), slots
        assert said.counters.misses > 0


@pytest.mark.parametrize("family", ["gpt_oss", "olmoe", "deepseek_v2", "jamba"])
def test_other_families_too(tmp_path: Path, pretend: Any, family: str) -> None:
    """Transposed matrices, biases, other activations, layers without experts."""
    own = configs.build(family, tmp_path)
    found = []
    for slots in (None, 2, 7):
        with understudy.load(tmp_path, device="pretend", slots=slots, max_context=64) as model:
            with torch.no_grad():
                found.append(model(**configs.inputs(family, own)).logits)
    with torch.no_grad():
        expected = own(**configs.inputs(family, own)).logits
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_experts_that_do_not_fit_host_memory_come_from_disk(tiny: Any, pretend: Any) -> None:
    source = tiny("qwen3_moe", "float32")
    resident, _ = answer(source, device="pretend")
    notes: list[str] = []
    for seed in range(3):
        pretend(seed=seed)
        found, said = answer(
            source, device="pretend", slots=6, memory="200KiB", on_status=notes.append
        )
        assert torch.equal(found, resident)
    assert any("host memory holds" in note and "of 32 experts" in note for note in notes)


def test_checked_slots_hold_whom_they_should(
    tiny: Any, pretend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("mixtral", "bfloat16")
    resident, _ = answer(source, device="pretend")
    monkeypatch.setenv("UNDERSTUDY_CHECK", "1")
    found, _ = answer(source, device="pretend", slots=4)
    assert torch.equal(found, resident)


def test_what_is_counted(tiny: Any, pretend: Any) -> None:
    source = tiny("mixtral", "bfloat16")
    with Engine(source, device="pretend", slots=6, predictor="none", max_context=64) as engine:
        before = engine.model.understudy.counters
        engine.generate(PROMPT, max_new_tokens=STEPS)
        c = engine.model.understudy.counters - before
        slab = engine.model.understudy.built.facts
        assert c.lookups == c.hits + c.misses and c.late == 0
        each = engine.model.understudy.runtime.compute.slots.slabs[0].nbytes
        assert c.demand_bytes == c.misses * each
        assert slab["device"] == "pretended device" and slab["host_experts"] == "24 of 24"


def test_the_host_waits_once_per_layer(tiny: Any, pretend: Any) -> None:
    """For the ids; copies are waited for by the device."""
    source = tiny("mixtral", "bfloat16")
    with Engine(source, device="pretend", slots=6, predictor="none", max_context=64) as engine:
        device = engine.model.understudy.runtime.transfer.device
        engine.generate(PROMPT, max_new_tokens=2)
        waits = device.waits
        engine.generate(PROMPT, max_new_tokens=STEPS)
        assert device.waits - waits == 0  # ids are read by torch itself on this device


def test_a_budget_that_is_too_small_says_what_would_do(tiny: Any, pretend: Any) -> None:
    source = tiny("mixtral", "bfloat16")
    with pytest.raises(BudgetTooSmall, match="device memory 64KiB|--device-memory") as found:
        understudy.load(source, device="pretend", device_memory="64KiB", max_context=64)
    model = understudy.load(
        source, device="pretend", device_memory=found.value.smallest_bytes, max_context=64
    )
    model.understudy.close()
    with pytest.raises(BudgetTooSmall, match="host copies"):
        understudy.load(source, "16KiB", device="pretend", max_context=64)


def test_a_device_with_less_room_than_it_said(tiny: Any, pretend: Any) -> None:
    source = tiny("mixtral", "bfloat16")
    resident, _ = answer(source, device="pretend")
    pretend(full_after=60_000)
    notes: list[str] = []
    found, _ = answer(source, device="pretend", on_status=notes.append)
    assert torch.equal(found, resident)
    assert any("the device has room for" in note for note in notes)


def test_pinning_that_is_refused_half_way_is_said(tiny: Any, pretend: Any) -> None:
    source = tiny("mixtral", "bfloat16")
    resident, _ = answer(source, device="pretend")
    pretend(refuse_pinning_after=40_000)
    notes: list[str] = []
    found, _ = answer(source, device="pretend", slots=5, on_status=notes.append)
    assert torch.equal(found, resident)
    assert any("pin" in note for note in notes)


def test_a_failed_read_raises_where_it_is_needed_and_is_tried_again(
    tiny: Any, pretend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny("mixtral", "bfloat16")
    resident, _ = answer(source, device="pretend")
    with Engine(source, memory="200KiB", device="pretend", slots=4, max_context=64) as engine:
        disk, broken = engine.model.understudy.built.store.disk, [True]
        read = disk.read

        def fails(chunk: Any) -> None:
            if broken[0]:
                raise ReadFailed("the disk is gone")
            read(chunk)

        monkeypatch.setattr(disk, "read", fails)
        with pytest.raises(ReadFailed, match="the disk is gone"):
            engine.generate(PROMPT, max_new_tokens=STEPS)
        broken[0] = False
        found = engine.generate(PROMPT, max_new_tokens=STEPS, keep_logits=True)
        assert found.logits is not None
        assert torch.equal(torch.stack(found.logits), resident)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "tpu"}, "unknown --device 'tpu'"),
        ({"device": "pretend", "kernel": "native"}, "--kernel native is of the CPU"),
        ({"device": "pretend", "decode": "moon"}, "unknown --decode 'moon'"),
    ],
)
def test_one_line_for_what_cannot_be(
    tiny: Any, pretend: Any, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UnderstudyError, match=words):
        understudy.load(tiny("mixtral", "bfloat16"), **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="an accelerator is here")
def test_without_an_accelerator_cuda_is_refused(tiny: Any) -> None:
    with pytest.raises(UnderstudyError, match="sees no accelerator.*--device cpu"):
        understudy.load(tiny("mixtral", "bfloat16"), device="cuda")

