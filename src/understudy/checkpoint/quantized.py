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

SUPPORTED = "MXFP4 (gpt-oss)"


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a checkpoint stores a quantised matrix [out, in].

    ``codes`` and ``scales``: the endings of the names of its two tensors, where a plain checkpoint
    would have the ending ``plain``. ``block``: weights per scale along a row; ``bytes_per_block``:
    where codes are an axis of blocks of so many bytes.
    """

    format: str
    plain: str
    codes: str
    scales: str
    block: int
    bytes_per_block: int

    def plain_name(self, name: str, ending: str) -> str | None:
        """What a plain checkpoint would call this tensor, if it has this ending."""
        return name.removesuffix(ending) + self.plain if name.endswith(ending) else None

    def codes_shape(self, out: int, inner: int) -> tuple[int, ...]:
        return out, inner // self.block, self.bytes_per_block

    def scales_shape(self, out: int, inner: int) -> tuple[int, ...]:
        return out, inner // self.block


MXFP4 = Scheme("mxfp4", plain="", codes="_blocks", scales="_scales", block=32, bytes_per_block=16)


def scheme_of(path: Path, raw: Mapping[str, Any]) -> Scheme | None:
    """What config.json says about quantisation: nothing, a known scheme, or `QuantizedExperts`."""
    for part in (raw, *(v for v in raw.values() if isinstance(v, dict))):
        found = part.get("quantization_config") or part.get("compression_config")
        if not found:
            continue
        method = found.get("quant_method", "?") if isinstance(found, dict) else "?"
        if method == "mxfp4":
            return MXFP4
        if method == PACKED and (path / MANIFEST).is_file():
            return None
        raise QuantizedExperts(
            f"{path} is quantised ({method}), which is not supported: use the bf16 or fp16 version"
            f" of this model; of quantised ones {SUPPORTED} and those of `understudy pack` run"
        )
    return None


def forget(config: Any) -> None:
    """Take quantisation out of a configuration: the guest has no quantised part, and transformers'
    quantisers must not look for one."""
    inner = (getattr(config, name, None) for name in getattr(config, "sub_configs", ()))
    for part in (config, *(c for c in inner if c is not None)):
        for name in ("quantization_config", "compression_config"):
            if hasattr(part, name):
                delattr(part, name)
