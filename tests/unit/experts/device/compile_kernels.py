"""Compile every kernel of `decide` for two generations of devices, on a machine that has none.

Run as a script, without Triton's interpreter. Fails if a kernel does not compile, or if the gather
kernel does not move 16 bytes per lane at a time, several before the first has to arrive.
"""

from __future__ import annotations

import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from understudy.experts.device import decide as kernels

LONG = {"ids", "stamp", "guard", "clock", "addresses", "sources", "counters"}
NUMBERS = {"layer", "pairs", "tokens", "k", "most", "nbytes", "lines", "slot_lines"}


def compiled(kernel: Any, generation: int, warps: int, **constants: int) -> Any:
    signature, hints = {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in NUMBERS:
            signature[name] = "i32"
        else:
            signature[name] = "*i64" if name in LONG else "*i32"
            hints[(i,)] = [["tt.divisibility", 16]]
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=hints)
    target = GPUTarget("cuda", generation, 32)
    return triton.compile(source, target=target, options={"num_warps": warps})


def main() -> None:
    for generation in (80, 90):
        for pool, pairs in ((1, 1), (64, 8), (512, 64)):
            sizes = {"EXPERTS": 512, "POOL": pool, "PAIRS": pairs}
            for kernel in (kernels.decide, kernels.guess):
                compiled(kernel, generation, 1, **sizes)
        compiled(kernels.commit, generation, 1, LIST=64)
        compiled(kernels.verify, generation, 1, EXPERTS=512, PAIRS=8)
        assembly = compiled(kernels.gather, generation, 4, LINES=512).asm["ptx"]
        moves = re.findall(r"(ld|st)\.global[.\w]*\.v4\.b32", assembly)
        assert moves == ["ld"] * 4 + ["st"] * 4, assembly


if __name__ == "__main__":
    main()
