"""The expert MLP compiled for accelerators that are not here: does it, and into what.

In a process of its own, because Triton either interprets or compiles. Nothing runs: a launch
compiles what it would launch.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

LARGEST_SHARED = 99 << 10  # bytes of shared memory per block on the smallest of sm_80 to sm_90
HIDDEN, WIDTH, RANKS = 1024, 512, 8
FORMATS = ("stored", "int8", "int4")
FEW = ("hidden", "down", "mixed")

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None or sys.platform != "linux", reason="no triton to compile with"
)


@pytest.fixture(scope="module", params=[80, 90])
def built(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    return _built(request.param)


@cache
def _built(arch: int) -> dict[str, dict[str, Any]]:
    """ "format kernel" -> what its PTX has in it."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = os.pathsep.join(path for path in sys.path if path)
    run = subprocess.run(
        [sys.executable, __file__, str(arch)],
        env={**clean, "PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found: dict[str, dict[str, Any]] = json.loads(run.stdout)
    return found


def test_everything_compiles(built: dict[str, dict[str, Any]]) -> None:
    kernels = (*FEW, "weighted", "hidden_many", "down_many")
    assert set(built) == {f"{format} {kernel}" for format in FORMATS for kernel in kernels}


def test_nothing_is_spilled(built: dict[str, dict[str, Any]]) -> None:
    assert {name: found["stack"] for name, found in built.items() if found["stack"]} == {}


def test_blocks_fit_into_shared_memory(built: dict[str, dict[str, Any]]) -> None:
    assert max(found["shared"] for found in built.values()) <= LARGEST_SHARED


@pytest.mark.parametrize("kernel", FEW)
@pytest.mark.parametrize("format", FORMATS)
def test_weights_are_loaded_sixteen_bytes_at_a_time(
    built: dict[str, dict[str, Any]], kernel: str, format: str
) -> None:
    """Two rows at a time, and what they share of x: as many wide loads as there are vectors in a
    turn of the loop. All others are of single numbers: slots, weights of ranks, scales."""
    found = built[f"{format} {kernel}"]
    wide = {"stored": 3, "int8": 4, "int4": 6}[format]  # per vector of each row: 8, 16, 32 weights
    assert found["wide"] % wide == 0
    assert found["wide"] >= wide
    assert set(found["narrow"]) <= {"ld.global.b32", "ld.global.b16"}
    scales = 8 * found["wide"] // wide if format == "int4" else 4  # by word, or by row
    assert sum(found["narrow"].values()) <= 4 + scales


@pytest.mark.parametrize("kernel", FEW)
def test_products_are_fused_where_the_source_says_so(
    built: dict[str, dict[str, Any]], kernel: str
) -> None:
    """8 weights of each of two rows per vector, and the weights of ranks."""
    found = built[f"stored {kernel}"]
    ranks = 2 * 2 if kernel == "mixed" else 0
    assert found["fma"] == 2 * 8 * found["wide"] // 3 + ranks


@pytest.mark.parametrize("format", FORMATS)
def test_both_ways_down_add_up_alike(built: dict[str, dict[str, Any]], format: str) -> None:
    """The same numbers in the same threads: what makes them the same bit for bit."""
    assert built[f"{format} down"]["sums"] == built[f"{format} mixed"]["sums"] != []


# ------------------------------------------------------------------------- in a process of its own


class _Driver:
    """What Triton's launcher asks of a driver until it has compiled."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class _Compiler:
    """A device on which launching is compiling."""

    def __init__(self) -> None:
        import torch

        self.built: dict[str, Any] = {}
        self.torch_device = torch.device("cpu")

    def launch(self, kernel: Any, grid: Sequence[int], *args: Any, **options: Any) -> None:
        self.built[kernel.__name__] = kernel.warmup(*args, grid=tuple(grid), **options)

    def allocate(self, nbytes: int) -> Any:
        import torch

        return torch.empty(nbytes, dtype=torch.uint8)


def _compile(arch: int) -> dict[str, dict[str, Any]]:
    from triton.runtime.driver import driver

    driver.set_active(_Driver(arch))
    return {
        f"{format} {name}": _told(kernel)
        for format in FORMATS
        for name, kernel in _kernels(format).items()
    }


def _kernels(format: str) -> dict[str, Any]:
    """Whatever a bf16 model launches of one format."""
    import torch

    from tests.unit.experts.device.reference import Experts

    device = _Compiler()
    kernel = Experts(HIDDEN, WIDTH, format, device=device, count=1).kernel
    x = torch.empty(2, HIDDEN, dtype=torch.bfloat16)
    slots = torch.empty(2, RANKS, dtype=torch.int32)
    into = torch.empty(2, RANKS, HIDDEN, dtype=torch.bfloat16)
    kernel.few(x, slots, torch.empty(2, RANKS))
    kernel.pairs(x, slots, into)
    kernel.sum(into, torch.empty(2, RANKS))
    kernel.many(x, torch.zeros_like(slots), into)
    return device.built


def _told(kernel: Any) -> dict[str, Any]:
    loads = Counter(re.findall(r"ld\.global[.\w]*", kernel.asm["ptx"]))
    wide = ("ld.global.v4.b32", "ld.global.v2.b64")
    return {
        "wide": sum(loads[name] for name in wide),
        "narrow": {name: count for name, count in loads.items() if name not in wide},
        "fma": kernel.asm["ptx"].count("fma.rn.f32"),
        "shared": kernel.metadata.shared,
        "stack": _stack(kernel.asm["cubin"]),
        "sums": _sums(kernel.asm["ttgir"]),
    }


def _sums(code: str) -> list[str]:
    """Over what shapes and layouts of tensors sums are taken."""
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", code, re.MULTILINE))
    summed = re.findall(r"\}\) : \(tensor<([^,]*), (#\w+)>\) ->", code)
    return sorted({f"{shape} {layouts[name]}" for shape, name in summed})


def _stack(cubin: bytes) -> int:
    """Bytes of stack per thread: where registers go that were not enough."""
    import tempfile

    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    found = re.search(r"STACK:(\d+)", told.stdout)
    assert found, told.stderr
    return int(found[1])


if __name__ == "__main__":
    print(json.dumps(_compile(int(sys.argv[1]))))
