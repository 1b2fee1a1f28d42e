"""On the shipped reference models no lossless setting changes a bit of 64 decode steps, and fp32
agrees with plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import exactness

MODELS = Path(__file__).parents[2] / "models"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["coarse", "fine"])
def test_bits_do_not_depend_on_settings(name: str, dtype: str) -> None:
    path = MODELS / name
    if not (path / "config.json").exists():
        pytest.skip(f"models/{name} is not here")
    verdict = exactness.judge(path, dtype)
    assert verdict.bit_identical
    if dtype == "float32":
        assert verdict.same_tokens
        assert verdict.differs <= 3e-6
    else:
        assert verdict.kl < 0.01  # rounding, as between transformers' own implementations
