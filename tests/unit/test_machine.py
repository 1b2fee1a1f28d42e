"""What /proc says, as it says it on different machines."""

from __future__ import annotations

import pytest

from understudy import machine

X86 = """processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8480+
flags\t\t: fpu sse4_2 avx avx2 avx512f avx512_vnni amx_bf16 amx_tile amx_int8

processor\t: 1
model name\t: something else
flags\t\t: fpu
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd sve\n"


def test_the_first_processor_of_x86() -> None:
    found = machine.processor({"/proc/cpuinfo": X86}.get)
    assert found.model == "Intel(R) Xeon(R) Platinum 8480+"
    assert found.vectors == ("AVX2", "AVX-512", "AVX-512 VNNI", "AMX")
    assert found.cpus >= 1


def test_a_processor_that_says_little() -> None:
    assert machine.processor({"/proc/cpuinfo": ARM}.get).vectors == ("NEON", "SVE")
    nothing = machine.processor(lambda path: None)
    assert nothing.model and nothing.vectors == ()


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19", "535.129.03"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build",
            "570.86.15",
        ),
        ("something that we have never seen", None),
        (None, None),
    ],
)
def test_the_driver(text: str | None, version: str | None) -> None:
    assert machine.driver({"/proc/driver/nvidia/version": text}.get) == version
