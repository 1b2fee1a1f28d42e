"""Slots of host memory: pinned as far as the system lets us, and it is said where it does not."""

from __future__ import annotations

import resource
from typing import Any

import pytest
import torch
from pretend import Pretend

from understudy.experts.device import PinningRefused, pinned
from understudy.experts.device.pinned import MIB, Slabs, probe

PAGE = 4096
SLOT = 3 * 256  # less than a page
KIB = 1024


def fill(slabs: Slabs) -> None:
    for slot in range(slabs.slots):
        slabs.view(slot).fill_(slot)


def assert_slots(slabs: Slabs) -> None:
    """Each is its own memory, on a page, where it says it is."""
    fill(slabs)
    for slot in range(slabs.slots):
        view = slabs.view(slot)
        assert view.shape == (slabs.slot_bytes,) and view.eq(slot).all()
        assert view.data_ptr() == slabs.addresses[slot] and view.data_ptr() % PAGE == 0
    assert len(set(slabs.addresses)) == slabs.slots


def test_slots_lie_in_few_blocks_without_waste() -> None:
    device = Pretend()
    slabs = Slabs(device, 10, SLOT, block_bytes=4 * PAGE)
    assert_slots(slabs)
    assert slabs.nbytes == device.pinned_bytes == 10 * PAGE
    assert sorted(block.numel() // PAGE for block in device.pinned) == [2, 4, 4]
    assert all(slabs.is_pinned(slot) for slot in range(10)) and slabs.note is None


def test_small_wishes_take_one_small_block() -> None:
    device = Pretend()
    Slabs(device, 3, 5 * PAGE)
    assert [block.numel() for block in device.pinned] == [15 * PAGE]


def test_a_slot_larger_than_a_block_is_a_block() -> None:
    device = Pretend()
    assert_slots(Slabs(device, 2, 5 * PAGE + 1, block_bytes=PAGE))
    assert [block.numel() for block in device.pinned] == [6 * PAGE] * 2


def test_no_slots_are_no_memory() -> None:
    device = Pretend()
    slabs = Slabs(device, 0, SLOT)
    assert slabs.nbytes == device.pinned_bytes == 0 and slabs.addresses == []
    slabs.close()


@pytest.mark.parametrize("allowed", range(11))
def test_what_may_be_pinned_is_pinned_and_the_rest_is_ordinary(allowed: int) -> None:
    device = Pretend(refuse_pinning_after=allowed * PAGE + 17)
    slabs = Slabs(device, 10, SLOT, block_bytes=4 * PAGE)
    assert_slots(slabs)
    count = min(allowed, 10)
    assert [slabs.is_pinned(slot) for slot in range(10)] == [True] * count + [False] * (10 - count)
    assert slabs.pinned_slots == count and device.pinned_bytes == count * PAGE
    assert (slabs.note is None) == (count == 10)


def test_the_note_says_how_much_what_it_costs_and_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pinned, "memlock_limit", lambda: 64 * MIB)
    device = Pretend(refuse_pinning_after=6 * MIB)
    note = Slabs(device, 10, 2 * MIB, block_bytes=4 * MIB).note
    assert note is not None and "\n" not in note
    assert note.startswith("0.01 of 0.02 GiB of host memory are pinned (the system refuses to pin")
    for part in ("slower and hold up the host", "64 MiB", "ulimit -l unlimited", "--memory"):
        assert part in note
    monkeypatch.setattr(pinned, "memlock_limit", lambda: None)
    note = Slabs(Pretend(refuse_pinning_after=0), 1, MIB).note
    assert note is not None and "ulimit" not in note


def test_the_limit_is_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, limit in ((8 * KIB, 8 * KIB), (resource.RLIM_INFINITY, None)):
        monkeypatch.setattr(resource, "getrlimit", lambda which, soft=soft: (soft, soft))
        assert pinned.memlock_limit() == limit


@pytest.mark.parametrize("allowed", [0, 2, 8])
def test_closing_gives_back_once_and_leaves_tensors_alone(allowed: int) -> None:
    device = Pretend(refuse_pinning_after=allowed * PAGE)
    slabs = Slabs(device, 4, SLOT, block_bytes=2 * PAGE)
    fill(slabs)
    held = [slabs.view(slot) for slot in range(4)]
    slabs.close()
    assert device.pinned_bytes == 0
    slabs.close()
    del slabs
    for view in held:
        view.add_(1)  # no crash


def test_copies_come_from_both_kinds() -> None:
    device = Pretend(refuse_pinning_after=PAGE)
    slabs = Slabs(device, 2, SLOT)
    fill(slabs)
    to, stream = device.allocate(2 * SLOT).view(2, SLOT), device.stream()
    for slot in range(2):
        stream.copy(to[slot], slabs.view(slot))
    stream.record().synchronize()
    assert torch.equal(to, torch.stack([slabs.view(0), slabs.view(1)]))
    slabs.close()


def test_blocks_that_are_too_large_are_halved_and_nobody_is_bothered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Pretend()
    pin = device.pin

    def small_only(nbytes: int) -> Any:
        if nbytes > 2 * PAGE:
            raise PinningRefused("too large in one piece")
        return pin(nbytes)

    monkeypatch.setattr(device, "pin", small_only)
    slabs = Slabs(device, 7, SLOT, block_bytes=5 * PAGE)
    assert slabs.pinned_slots == 7 and slabs.note is None
    assert [block.numel() // PAGE for block in device.pinned] == [2, 2, 2, 1]


def test_an_interrupt_while_pinning_leaves_nothing_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Pretend()
    pin = device.pin

    def interrupted(nbytes: int) -> Any:
        if device.pinned_bytes:
            raise KeyboardInterrupt
        return pin(nbytes)

    monkeypatch.setattr(device, "pin", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Slabs(device, 4, SLOT, block_bytes=PAGE)
    assert device.pinned_bytes == 0


@pytest.mark.parametrize("limit", [0, 3 * KIB, 10 * KIB, 100 * KIB])
@pytest.mark.parametrize("allowed", [None, 0, 9 * KIB, 33 * KIB])
def test_a_probe_finds_what_can_be_pinned_and_releases_it(
    monkeypatch: pytest.MonkeyPatch, limit: int, allowed: int | None
) -> None:
    monkeypatch.setattr(pinned, "PROBED", KIB)
    device = Pretend(refuse_pinning_after=allowed)
    found = probe(device, limit)
    refused = allowed is not None and allowed < limit
    assert found.nbytes == (allowed if refused else limit)
    assert (found.refusal is not None) == refused
    assert device.pinned_bytes == 0 and found.seconds >= 0
