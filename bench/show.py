"""Rows on a terminal: a table, then the ratios that have a target.

Knows: how a row is read by a person, and the targets. Does not know: how rows came about.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from understudy.plan import shown_size

Row = dict[str, Any]

WHO: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("cell", lambda r: cell_name(r)),
    ("contestant", lambda r: r["contestant"]),
    ("format", lambda r: r["format"]),
)
DECODE_COLUMNS = (
    *WHO,
    ("ms/token", lambda r: ms(r["tpot_ms"])),
    ("min-max", lambda r: f"{ms(r['tpot_min_ms'])}-{ms(r['tpot_max_ms'])}"),
    ("TTFT", lambda r: ms(r["ttft_ms"])),
    ("read/token", lambda r: size(r["bytes_per_token"])),
    ("hits", lambda r: percent(r["hit_rate"])),
    ("stall", lambda r: ms(r["stall_ms"])),
    ("peak RSS", lambda r: size(r["rss_bytes"])),
    ("own", lambda r: ms(r["floor_own_ms"])),
    ("belady", lambda r: ms(r["floor_belady_ms"])),
    ("x own", lambda r: times(r["over_floor_own"])),
    ("bytes x belady", lambda r: times(r["missed_over_belady"])),
    ("x understudy", lambda r: times(r["against"].get("understudy"))),
)
PREFILL_COLUMNS = (
    *WHO,
    ("TTFT ms", lambda r: ms(r["ttft_ms"])),
    ("min-max", lambda r: f"{ms(r['ttft_min_ms'])}-{ms(r['ttft_max_ms'])}"),
    ("tokens/s", lambda r: f"{r['tokens_per_second']:.0f}"),
    ("read", lambda r: size(r["bytes_read"])),
    ("x once", lambda r: times(r["read_over_once"])),
    ("stall", lambda r: ms(r["stall_ms"])),
    ("own", lambda r: ms(r["floor_own_ms"])),
    ("x own", lambda r: times(r["over_floor_own"])),
    ("x understudy", lambda r: times(r["against"].get("understudy"))),
)

START_COLUMNS = (
    *WHO,
    ("load s", lambda r: f"{r['load_s']:.2f}"),
    ("first token s", lambda r: f"{r['first_s']:.2f}"),
    ("start s", lambda r: f"{r['start_s']:.2f}"),
    ("min-max", lambda r: f"{r['start_min_s']:.2f}-{r['start_max_s']:.2f}"),
    ("floor s", lambda r: "-" if r["floor_s"] is None else f"{r['floor_s']:.2f}"),
    ("over floor s", lambda r: "-" if r["floor_s"] is None else f"{r['over_s']:.2f}"),
)


def table(rows: Sequence[Row], columns: Sequence[tuple[str, Callable[[Row], str]]]) -> str:
    """Aligned columns; a skipped row is its reason."""
    names = [name for name, _ in columns]
    lines: list[list[str]] = []
    notes: list[str] = []
    for row in rows:
        if row.get("skipped"):
            what = f"stopped after {row['rounds']} rounds" if row.get("rounds") else "skipped"
            notes.append(f"{cell_name(row)} {row['contestant']}: {what}, {row['skipped']}")
        if row.get("rounds"):
            lines.append([show(row) for _, show in columns])
    widths = [max(len(line[i]) for line in [names, *lines]) for i in range(len(names))]
    text = [_aligned(line, widths) for line in [names, *lines]]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:], *notes])


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Words to the left, numbers to the right."""
    padded = [
        cell.ljust(width) if i < 3 else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()


# ----------------------------------------------------------------------------- what has a target


def decode_ratios(rows: Sequence[Row]) -> dict[str, float]:
    """The ratios a person looks at first, by cell and name."""
    out: dict[str, float] = {}
    for row in rows:
        if not row.get("rounds") or not row["contestant"].startswith("understudy"):
            continue
        against, cell = row["against"], cell_name(row)
        pairs = {
            "understudy": ("llama.cpp-bf16", "transformers", "accelerate", "understudy-noprefetch"),
            "understudy-int8": ("llama.cpp-q8_0",),
            "understudy-int4": ("llama.cpp-q4_0", "understudy-int4-noprefetch"),
        }.get(row["contestant"], ())
        for other in pairs:
            if other in against:
                out[f"{cell} {row['contestant']} / {other}"] = against[other]
        if row["budget_fraction"] is not None and row["contestant"] == "understudy":
            out[f"{cell} measured / floor_own"] = row["over_floor_own"]
            if row["missed_over_belady"] is not None:
                out[f"{cell} missed / belady"] = row["missed_over_belady"]
    return out


def prefill_ratios(rows: Sequence[Row]) -> dict[str, float]:
    out: dict[str, float] = {}
    for row in rows:
        if row.get("rounds") and row["contestant"] == "understudy":
            for other, value in row["against"].items():
                out[f"{cell_name(row)} understudy / {other}"] = value
            if row["read_over_once"] is not None and row["budget_fraction"] is not None:
                out[f"{cell_name(row)} read / once"] = row["read_over_once"]
    return out


def ratios_text(ratios: dict[str, float]) -> str:
    return "\n".join(f"{name:60} {value:8.3f}" for name, value in ratios.items())


# ----------------------------------------------------------------------------------------- progress


def progress(label: str) -> Callable[[int, int], None]:
    """A line on the standard error that counts on a terminal, and only ends elsewhere."""
    live, shown = sys.stderr.isatty(), -1

    def report(done: int, total: int) -> None:
        nonlocal shown
        percent = 100 * done // max(1, total)
        if percent == shown or (percent < 100 and not live):
            return
        shown = percent
        end = "\n" if percent == 100 else ""
        print(f"\r{label}: {percent} %", end=end, file=sys.stderr, flush=True)

    return report


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# -------------------------------------------------------------------------------------------- cells


def cell_name(row: Row) -> str:
    share = row["budget_fraction"]
    return f"{row['model']}:{'ram' if share is None else f'{100 * share:g}'}"


def ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def size(value: float | None) -> str:
    return "-" if value is None else shown_size(value)


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f} %"


def times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
