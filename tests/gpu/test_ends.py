"""Both ends of a miss, and the smallest kernel, on a real device."""

from __future__ import annotations

import pytest
import torch

from understudy.experts.device import ends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no accelerator here"),
]


def test_both_ends_are_measured_alone_and_at_once() -> None:
    from understudy.experts.device.cuda import open_cuda

    device = open_cuda("cuda")
    crowd = ends.typical()
    found = ends.both(device, crowd)
    assert 1e9 < found.link < 1e12
    assert found.link_beside <= 1.1 * found.link
    assert found.host_beside <= 1.2 * found.host
    assert 0 < found.pageable <= 1.1 * found.link
    assert 0 < found.handover < 1e-2
    assert 0 < found.phi < 1


def test_a_kernel_can_be_built_and_run() -> None:
    pytest.importorskip("triton")
    from understudy.checkup import triton_why_not
    from understudy.experts.device.cuda import open_cuda

    assert triton_why_not(open_cuda("cuda")) is None
