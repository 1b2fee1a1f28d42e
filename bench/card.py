"""The card above every table: what was measured on what, so that a figure can be judged later.

Knows: the machine, the versions, the models. Does not know: results.
"""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from understudy import plan as planning

FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "asimd", "i8mm")
PACKAGES = ("understudy", "torch", "transformers", "llama-cpp-python", "gguf", "accelerate")


def card(models: dict[str, Path], note: str = "") -> dict[str, Any]:
    """Plain values; `lines` makes them readable."""
    import torch

    cpu, flags = _cpu()
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "cpu_flags": [flag for flag in FLAGS if flag in flags],
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "free_bytes": planning.free_memory(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "torch_threads": torch.get_num_threads(),
        "models": {name: _model(path) for name, path in models.items()},
        "note": note,
    }


def _cpu() -> tuple[str, set[str]]:
    name, flags = platform.processor() or platform.machine(), set[str]()
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    except OSError:
        return name, flags
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        if key.strip() in ("flags", "Features"):
            flags = set(value.split())
    return name, flags


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _model(path: Path) -> dict[str, Any]:
    from understudy.loading import inspect

    found = inspect(path)
    return {
        "folder": path.name,
        "bytes": found.checkpoint_bytes,
        "moe_layers": found.moe_layers,
        "experts_per_layer": found.experts_per_layer,
        "top_k": found.top_k,
        "expert_bytes": found.expert_bytes,
        "dense_bytes": found.dense_bytes,
        "active_bytes": found.dense_bytes + found.moe_layers * found.top_k * found.expert_bytes,
    }


def lines(found: dict[str, Any]) -> list[str]:
    size = planning.shown_size
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if v)
    missing = [k for k, v in found["versions"].items() if not v]
    out = [
        f"machine: {found['cpu']}, {found['cores']} cores ({' '.join(found['cpu_flags'])}), "
        f"{size(found['memory_bytes'])}, {size(found['free_bytes'])} free, {found['system']}",
        f"versions: Python {found['python']}, {versions}"
        + (f"; not here: {', '.join(missing)}" if missing else ""),
    ]
    for name, model in found["models"].items():
        out.append(
            f"model {name}: {size(model['bytes'])}, {model['moe_layers']} x "
            f"{model['experts_per_layer']} experts of {size(model['expert_bytes'])}, top "
            f"{model['top_k']}, {size(model['dense_bytes'])} dense, "
            f"{size(model['active_bytes'])} read per token"
        )
    return [*out, *([found["note"]] if found["note"] else [])]


def show(found: dict[str, Any]) -> None:
    """Everything but the table and the last line goes beside the standard output."""
    for line in lines(found):
        print(line, file=sys.stderr)
