"""The smallest kernel, under Triton's interpreter and as machine code for the devices to come.

Triton reads its environment when it is imported, so each way has a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

INTERPRETED = """
import torch
from understudy.experts.device import trial

class Device:
    def __init__(self, wrong=0):
        self.wrong = wrong
    def allocate(self, nbytes):
        return torch.empty(nbytes, dtype=torch.uint8)
    def launch(self, kernel, grid, *args):
        kernel[tuple(grid)](*args)
    def fetch(self, *tensors):
        return [(t + self.wrong).tolist() for t in tensors]

print(trial.works(Device()), trial.works(Device(wrong=1)))
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from understudy.experts.device import trial

source = ASTSource(
    fn=trial._squares,
    signature={"out": "*i32", "lanes": "constexpr"},
    constexprs={"lanes": trial.LANES},
)
print(all(triton.compile(source, target=GPUTarget("cuda", c, 32)).asm["cubin"] for c in (80, 90)))
"""


@pytest.mark.parametrize(
    ("code", "interpret", "said"), [(INTERPRETED, "1", "True False"), (COMPILED, "0", "True")]
)
def test_it_runs_and_is_compiled(code: str, interpret: str, said: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": interpret}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == said, done.stderr[-2000:]
