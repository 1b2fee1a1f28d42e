"""What every benchmark prints first and last: the machine, a table, a line of JSON.

Knows: how to look at this machine, and how a table is set. Does not know: what was measured.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "understudy", "llama-cpp-python", "accelerate")
FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, versions, date."""
    import os

    fields: dict[str, str] = {}
    for line in _read("/proc/cpuinfo").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    flags = set(fields.get("flags", "").split())
    memory = next((line.split()[1] for line in _read("/proc/meminfo").splitlines()), "0")
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M"),
        "cpu": fields.get("model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "features": [flag for flag in FLAGS if flag in flags],
        "memory_gib": round(int(memory) / 2**20, 1),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def progress(text: str) -> None:
    """For the person who waits; results go to standard output."""
    print(text, file=sys.stderr, flush=True)


def show_card(title: str, facts: dict[str, Any]) -> None:
    print(f"# {title}")
    m = machine()
    print(f"{m['cpu']}, {m['cores']} cores ({' '.join(m['features'])}), {m['memory_gib']} GiB; "
          + ", ".join(f"{n} {v or 'missing'}" for n, v in m["versions"].items()))  # fmt: skip
    for name, value in facts.items():
        print(f"{name}: {value}")
    print()


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, numbers to the right."""
    texts = [[_text(cell) for cell in row] for row in rows]
    widths = [max(len(c), *(len(r[i]) for r in texts), 3) for i, c in enumerate(columns)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(columns, widths, strict=True)) + " |"]
    lines.append(
        "|" + "|".join("-" * (w + 1) + (":" if i else "-") for i, w in enumerate(widths)) + "|"
    )
    for row in texts:
        cells = [c.rjust(w) if i else c.ljust(w)
                 for i, (c, w) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _text(cell: Any) -> str:
    if cell is None:
        return "-"
    if isinstance(cell, float):
        return (
            f"{cell:.0f}"
            if abs(cell) >= 100
            else f"{cell:.1f}"
            if abs(cell) >= 10
            else f"{cell:.2f}"
        )
    return str(cell)


def last_line(result: dict[str, Any]) -> None:
    print(json.dumps(result))
