"""Checkpoints that store their experts quantised: how they say so, and what they call the parts.

Knows: quantization_config, and the names and shapes of codes and scales of each known scheme.
Does not know: what codes mean (formats), or where they lie (layouts).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from understudy.checkpoint.files import MANIFEST
from understudy.core import QuantizedExperts

PACKED = "understudy"  # the method that `understudy pack` writes, so that others do not misread it
SUPPORTED = (
    "MXFP4 (gpt-oss), FP8 in blocks of 128 (DeepSeek), compressed-tensors int4 (Kimi) and what"
    " `understudy pack` writes"
)


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a checkpoint stores a quantised matrix [out, in].

    ``codes`` and ``scales``: the endings of the names of its two tensors, where a plain checkpoint
    would have the ending ``plain``. ``group``: weights of a row that share a scale (0: all);
    ``rows``: rows that share it; ``per_code``: weights in one element of the codes; ``block``:
    codes that a checkpoint keeps on an axis of their own.
    """

    format: str
    plain: str
    codes: str
    scales: str
    group: int
    per_code: int
    block: int = 0
    rows: int = 1

    def plain_name(self, name: str, ending: str) -> str | None:
        """What a plain checkpoint would call this tensor, if it has this ending."""
        return name.removesuffix(ending) + self.plain if name.endswith(ending) else None

    def codes_shape(self, out: int, inner: int) -> tuple[int, ...]:
        codes = inner // self.per_code
        return (out, codes // self.block, self.block) if self.block else (out, codes)

    def scales_shape(self, out: int, inner: int) -> tuple[int, ...]:
        return -(-out // self.rows), -(-inner // self.group) if self.group else 1

    def scales_shape_of(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the scales of codes [out, n]."""
        return self.scales_shape(codes[0], codes[1] * self.per_code)

    def scales_name(self, name: str) -> str:
        """What the scales are called whose codes are called ``name``."""
        return name.removesuffix(self.codes) + self.scales


MXFP4 = Scheme("mxfp4", "", "_blocks", "_scales", group=32, per_code=2, block=16)
FP8 = Scheme("fp8", ".weight", ".weight", ".weight_scale_inv", group=128, per_code=1, rows=128)


def scheme_of(path: Path, raw: Mapping[str, Any]) -> Scheme | None:
    """What config.json says about quantisation: nothing, a known scheme, or `QuantizedExperts`."""
    for part in (raw, *(v for v in raw.values() if isinstance(v, dict))):
        found = part.get("quantization_config") or part.get("compression_config")
        if not found:
            continue
        method = found.get("quant_method", "?") if isinstance(found, dict) else "?"
        if method == "mxfp4":
            return MXFP4
        if method == "fp8":
            return _fp8(path, found)
        if method == "compressed-tensors":
            return _compressed_tensors(path, found)
        if method == PACKED and (path / MANIFEST).is_file():
            return None
        raise refusal(path, str(method))
    return None


def refusal(path: Path, what: str) -> QuantizedExperts:
    return QuantizedExperts(
        f"{path} is quantised ({what}), which is not supported: use the bf16 or fp16 version of"
        f" this model; of quantised ones {SUPPORTED} run"
    )


def _fp8(path: Path, found: Mapping[str, Any]) -> Scheme:
    """Blocks of 128 x 128; activations are not rounded here, so how others do it does not matter,
    unless their scales are part of the checkpoint."""
    block = list(found.get("weight_block_size") or ())
    if block != [128, 128] or found.get("activation_scheme", "dynamic") != "dynamic":
        raise refusal(path, f"fp8 in blocks of {block or 'whole matrices'}")
    return FP8


def _compressed_tensors(path: Path, found: Mapping[str, Any]) -> Scheme:
    """Weights of one kind: 4-bit integers, symmetric, in groups of a row."""
    groups = found.get("config_groups")
    kinds = list(groups.values()) if isinstance(groups, dict) else []
    weights = kinds[0].get("weights") if len(kinds) == 1 and isinstance(kinds[0], dict) else None
    weights = weights if isinstance(weights, dict) else {}
    stored = found.get("format") or (kinds[0].get("format") if kinds else None)
    known = {
        "format": stored == "pack-quantized",
        "num_bits": weights.get("num_bits") == 4,
        "type": weights.get("type", "int") == "int",
        "symmetric": weights.get("symmetric") is True,
        "strategy": weights.get("strategy") in ("group", "channel"),
        "actorder": weights.get("actorder") in (None, "weight", "static"),
        "activations": not (kinds and kinds[0].get("input_activations")),
    }
    strange = [name for name, fits in known.items() if not fits]
    if strange:
        raise refusal(path, f"compressed-tensors with another {' and '.join(strange)}")
    group = int(weights.get("group_size") or 0) if weights["strategy"] == "group" else 0
    return Scheme("ct-int4", ".weight", ".weight_packed", ".weight_scale", group, per_code=8)


def forget(config: Any) -> None:
    """Take quantisation out of a configuration: the guest has no quantised part, and transformers'
    quantisers must not look for one."""
    inner = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
    for part in (config, *(c for c in inner if c is not None)):
        for name in ("quantization_config", "compression_config"):
            if hasattr(part, name):
                delattr(part, name)
