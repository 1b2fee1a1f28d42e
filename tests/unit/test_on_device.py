"""A model whose experts are computed on a device: same bits whatever is resident, no race, faults.

No accelerator is needed: the device is pretended, its copies happen late, and a missing fence is
an error (`tests/pretend`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import on_a_device
import pytest
import torch
from batch.drive import Driver, greedy_alone
from families import configs
from pretend import Pretend
from transformers import AutoModelForCausalLM

import understudy
from understudy import on_device
from understudy.batch.fibers import Fibers
from understudy.batch.paged import Paged
from understudy.core import BudgetTooSmall, Counters, ReadFailed, UnderstudyError

PROMPT = [5, 17, 3, 44, 60, 2, 9, 31, 8, 77, 12]
STEPS = 12


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``pretend(...)``: from now on ``device="pretend"`` is a `Pretend` made with these."""

    def choose(**settings: Any) -> None:
        monkeypatch.setitem(
            on_device.OPENERS, "pretend", lambda asked: Pretend(**{"memory": 2 << 30, **settings})
        )

    choose()
    return choose


def answer(source: Path, memory: str = "1GiB", **options: Any) -> tuple[torch.Tensor, Counters]:
    """[steps, vocabulary] logits of a greedy answer, and what was counted."""
    options = {"kernel": "torch", **options}
    with understudy.load(source, memory, max_context=64, **options) as model:
        found = say(model)
        runtime = model.understudy.runtime
        with runtime._lock:
            runtime.transfer.settle()
        runtime.director.book.check_integrity(idle=True)
        return found, model.understudy.counters


def loaded(source: Path, **options: Any) -> Any:
    return understudy.load(source, device="pretend", kernel="torch", max_context=64, **options)


def say(model: Any) -> torch.Tensor:
    return on_a_device.say(model, STEPS, PROMPT)


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
        assert said.misses > 0


@pytest.mark.parametrize("family", ["gpt_oss", "olmoe", "deepseek_v2", "jamba"])
def test_other_families_too(tmp_path: Path, pretend: Any, family: str) -> None:
    """Transposed matrices, biases, other activations, layers without experts."""
    own = configs.build(family, tmp_path)
    found = []
    for slots in (None, 2, 7):
        with loaded(tmp_path, slots=slots) as model, torch.no_grad():
            found.append(model(**configs.inputs(family, own)).logits)
    with torch.no_grad():
        expected = own(**configs.inputs(family, own)).logits
    torch.testing.assert_close(found[0], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("resolver", ["cpu-split", "makespan"])
@pytest.mark.parametrize("slots", [2, 6])
def test_misses_computed_in_host_memory_round_elsewhere_and_no_more(
    tiny: Any, pretend: Any, resolver: str, slots: int
) -> None:
    source = tiny("qwen3_moe", "float32")
    resident, _ = answer(source, device="pretend")
    pretend(bandwidth=1e5)  # a link that is slower than this processor
    for memory in ("1GiB", "200KiB"):  # all in host memory, or some on disk
        found, counted = answer(
            source, memory, device="pretend", slots=slots, resolver=resolver, predictor="none"
        )
        assert counted.computed_in_place > 0
        torch.testing.assert_close(found, resident, atol=2e-5, rtol=1e-5)


def test_experts_that_do_not_fit_host_memory_come_from_disk(tiny: Any, pretend: Any) -> None:
    source = tiny("qwen3_moe", "float32")
    resident, _ = answer(source, device="pretend")
    notes: list[str] = []
    for seed in range(3):
        pretend(seed=seed)
        found, _ = answer(
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
    with loaded(source, slots=6, predictor="none") as model:
        say(model)
        c, facts = model.understudy.counters, model.understudy.policies
        assert c.lookups == c.hits + c.misses and c.late == 0
        assert c.demand_bytes == c.misses * model.understudy.runtime.compute.slots.slabs[0].nbytes
        assert facts["device"] == "pretended device" and facts["host_experts"] == "24 of 24"


@pytest.mark.parametrize("predictor", ["none", "next-gate"])
def test_the_host_waits_once_per_layer(tiny: Any, pretend: Any, predictor: str) -> None:
    """For ids, and with them for what look-ahead says; never for a copy."""
    source = tiny("mixtral", "bfloat16")
    with loaded(source, slots=6, predictor=predictor, self_switch=False) as model:
        say(model)
        say(model)  # by now products are known to pick what routers pick
        device, before = model.understudy.runtime.transfer.device, model.understudy.counters
        waits = device.waits
        say(model)
        counted = model.understudy.counters - before
        assert counted.misses > 0
        assert device.waits - waits == counted.events == 3 * STEPS


def test_a_budget_that_is_too_small_says_what_would_do(tiny: Any, pretend: Any) -> None:
    source = tiny("mixtral", "bfloat16")
    with pytest.raises(
        BudgetTooSmall, match=r"device memory 65536 bytes is too small.*try --device-memory"
    ) as found:
        loaded(source, device_memory="64KiB")
    loaded(source, device_memory=found.value.smallest_bytes).understudy.close()
    with pytest.raises(BudgetTooSmall, match="host copies"):
        loaded(source, memory="16KiB")


def test_a_device_with_less_room_than_it_said(tiny: Any, pretend: Any) -> None:
    source = tiny("mixtral", "bfloat16")
    resident, _ = answer(source, device="pretend")
    pretend(full_after=400_000)
    notes: list[str] = []
    found, _ = answer(source, device="pretend", on_status=notes.append)
    assert torch.equal(found, resident)
    assert any("the device is fuller than planned" in note for note in notes)


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
    with loaded(source, memory="200KiB", slots=4) as model:
        disk, broken = model.understudy.built.store.disk, [True]
        read = disk.read

        def fails(chunk: Any) -> None:
            if broken[0]:
                raise ReadFailed("the disk is gone")
            read(chunk)

        monkeypatch.setattr(disk, "read", fails)
        with pytest.raises(ReadFailed, match="the disk is gone"):
            say(model)
        broken[0] = False
        assert torch.equal(say(model), resident)


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
    with pytest.raises(UnderstudyError, match=r"sees no accelerator.*--device cpu"):
        understudy.load(tiny("mixtral", "bfloat16"), device="cuda")


def test_of_two_devices_the_first_or_the_one_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from understudy.experts.device import cuda

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(cuda, "Cuda", lambda index: index)
    assert [cuda.open_cuda("cuda"), cuda.open_cuda("cuda:1")] == [0, 1]
    for asked, words in (("cuda:2", "only 2 visible"), ("cuda:x", "names no accelerator")):
        with pytest.raises(UnderstudyError, match=words):
            cuda.open_cuda(asked)


@pytest.mark.parametrize("kind", [Paged, Fibers])
def test_many_sequences_at_once_get_the_answers_of_the_cpu(
    tiny: Any, pretend: Any, kind: Any
) -> None:
    folder = tiny("qwen3_moe", "float32")
    prompts = [PROMPT, PROMPT[:4], PROMPT[3:9]]
    plain = AutoModelForCausalLM.from_pretrained(folder)
    expected = [greedy_alone(plain, prompt, 6) for prompt in prompts]
    more = {"max_rows": 4, "max_batch_tokens": 32} if kind is Paged else {}
    with loaded(folder, slots=6, frame="eager") as model:
        assert model._captured is None, "recorded steps know nothing of rows"
        driver = Driver(kind(model, capacity=256, **more))
        rows = [driver.enter(prompt) for prompt in prompts]
        driver.step({rows[0]: 5})
        driver.answer(rows, 6)
    answers = [row.tokens[len(p) :][:6] for row, p in zip(rows, prompts, strict=True)]
    assert answers == expected
