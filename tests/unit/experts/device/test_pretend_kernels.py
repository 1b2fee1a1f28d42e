"""Triton kernels on the pretended device, through Triton's interpreter."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported

import pytest
import torch
from pretend import Pretend

triton = pytest.importorskip("triton")
tl = triton.language


@triton.jit
def add_from_host(out, address, count, BLOCK: tl.constexpr):
    """``out`` += what lies at a host address: how a device reads pinned memory."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    host = tl.load(address).to(tl.pointer_type(tl.float32))
    found = tl.load(host + at, mask=at < count, other=0.0)
    tl.store(out + at, tl.load(out + at, mask=at < count) + found, mask=at < count)


@pytest.mark.parametrize("inference", [False, True])
def test_kernels_run_and_are_recorded(inference: bool) -> None:
    device = Pretend()
    memory = device.pin(40).view(torch.float32)
    memory.copy_(torch.arange(10.0))
    with torch.inference_mode(inference):
        address = torch.tensor([memory.data_ptr()])
        out = torch.zeros(10)
        device.launch(add_from_host, [3], out, address, 10, BLOCK=4, num_warps=1)
        assert torch.equal(out, memory)
        graph = device.graph()
        graph.begin()
        doubled = out * 2
        device.launch(add_from_host, [3], doubled, address, 10, BLOCK=4, num_warps=1)
        last = doubled.sum()
        graph.end()
        assert torch.equal(out, memory) and last.isnan()
        graph.replay()
    assert torch.equal(doubled, memory * 3) and last == memory.sum() * 3
