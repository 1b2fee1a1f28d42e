"""Tests that need an accelerator: `pytest tests/gpu`, in a process of their own."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _kernels_are_compiled() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("kernels are interpreted in this process; run pytest tests/gpu by itself")
