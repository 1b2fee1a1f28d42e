"""How much of a device the gather kernel takes, and which amount is quickest here.

Knows: programs, lines, seconds. Does not know: experts, caches. Nobody can say beforehand what
fills a link: it takes its round trip times its bandwidth under way at once, and both differ between
machines. More programs than that only take room from the experts that are computed meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from understudy.experts.device import Device

LINE = 16  # bytes: what one lane loads at once
CLOSE = 0.98  # of the best bandwidth is as good as the best


@dataclass(frozen=True, slots=True)
class Reach:
    """``programs`` share the work; each has ``lines`` of 16 bytes under way, spread over ``warps``
    of 32 lanes. The defaults are a guess: 384 KiB under way fill a link of 60 GB/s while a round
    trip takes no more than six microseconds. `rates` says what is true here."""

    programs: int = 48
    lines: int = 512
    warps: int = 4

    @property
    def under_way(self) -> int:
        """Bytes."""
        return self.programs * self.lines * LINE


CANDIDATES = tuple(
    Reach(programs, lines, lines // 128)
    for programs, lines in product((8, 16, 32, 48, 64, 128), (256, 512, 1024))
)


def rates(
    device: Device,
    arena: torch.Tensor,
    slot_bytes: int,
    addresses: Sequence[int],
    nbytes: int,
    *,
    candidates: Sequence[Reach] = CANDIDATES,
    repeats: int = 5,
) -> dict[Reach, float]:
    """Bytes per second of each candidate, best of ``repeats``: the slabs of ``nbytes`` at these
    host addresses go to the first slots of ``arena``, whose contents are lost. The host waits."""
    from understudy.experts.device.decide import gather

    sources, targets, length = _to_first_slots(device, addresses)
    lines = (nbytes // LINE, slot_bytes // LINE)
    found = {}
    for reach in candidates:
        spans = []
        for _ in range(repeats + 1):  # the first one compiles
            begun = device.compute.record(timed=True)
            device.launch(
                gather,
                (reach.programs,),
                *(sources, targets, length, arena.view(torch.int32), *lines),
                LINES=reach.lines,
                num_warps=reach.warps,
            )
            ended = device.compute.record(timed=True)
            ended.synchronize()
            spans.append(ended.seconds_since(begun))
        found[reach] = len(addresses) * nbytes / min(spans[1:])
    return found


def _to_first_slots(device: Device, addresses: Sequence[int]) -> list[torch.Tensor]:
    wanted = [
        torch.tensor(list(addresses), dtype=torch.int64),
        torch.arange(len(addresses), dtype=torch.int32),
        torch.tensor([len(addresses)], dtype=torch.int32),
    ]
    there = [device.allocate(t.nbytes).view(t.dtype) for t in wanted]
    for to, values in zip(there, wanted, strict=True):
        device.compute.copy(to, values)
    return there


def smallest_of_the_quick(found: Mapping[Reach, float]) -> Reach:
    """The candidate that takes least of the device among those close to the best."""
    best = max(found.values())
    close = [reach for reach, rate in found.items() if rate >= CLOSE * best]
    return min(close, key=lambda reach: (reach.programs, reach.under_way))
