"""The smallest kernel there is: can Triton build one for this device, and is the answer right?

Knows: Triton. Does not know: experts. Building fails for reasons that importing Triton does not
show: no C compiler, no Python headers, a driver that is too old.
"""
# mypy: allow-untyped-defs, allow-untyped-decorators, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from understudy.experts.device import Device

LANES = 64


@triton.jit
def _squares(out, lanes: tl.constexpr):
    at = tl.arange(0, lanes)
    tl.store(out + at, at * at)


def works(device: Device) -> bool:
    """Whether the kernel gives what it should. Raises whatever Triton raises."""
    out = device.allocate(4 * LANES).view(torch.int32)
    device.launch(_squares, (1,), out, LANES)
    (found,) = device.fetch(out)
    return bool(found == [i * i for i in range(LANES)])
