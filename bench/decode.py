"""How fast is a token, beside llama.cpp, transformers and accelerate, and above its floor?

One command: ``python bench/decode.py``. Prints a card, a table and, as its last line, JSON. Cells
are MODEL:PERCENT (memory limited from outside to that share of the model + 700 MiB, for everybody)
or MODEL:ram. Needs root for the limits; peers come with ``make bench-peers``.

    --smoke    a small twin, no peers, no limits from outside, a few tokens
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import card, twins
from bench.cells import Cell, Record, row, run_cell
from bench.contestants import IN_RAM, LIMITED, PEERLESS, named

CELLS = "fine:ram,fine:50,fine:33,fine:25,coarse:ram,coarse:50,coarse:33,coarse:25"
COLUMNS = ("cell, contestant", "ms/token", "min", "max", "TTFT ms", "MB/token", "hit %", "stall ms",
           "peak MiB", "floor own", "floor belady", "x floor", "bytes/belady", "vs llama.cpp",
           "vs others")  # fmt: skip

# Who is compared with whom: format of ours -> the peers of the same weights.
PEERS = {"bf16": "llama.cpp-bf16", "int8": "llama.cpp-q8_0", "int4": "llama.cpp-q4_0"}


def compare(rows: list[dict[str, Any]]) -> None:
    """Add the ratios to peers: how many times their time ours takes."""
    times = {r["contestant"]: r["tpot_ms"] for r in rows if "tpot_ms" in r}
    for r in rows:
        if "tpot_ms" not in r:
            continue
        peer = times.get(PEERS.get(r["format"], ""))
        if r["contestant"].startswith("understudy") and peer:
            r["of_llama_cpp"] = r["tpot_ms"] / peer
        for other in ("transformers", "accelerate", "understudy-noprefetch"):
            if r["contestant"] == "understudy" and other in times:
                r[f"of_{other.replace('-', '_')}"] = r["tpot_ms"] / times[other]


def shown(cell: Cell, r: dict[str, Any]) -> list[Any]:
    name = f"{cell.name} {r['contestant']}"
    if "tpot_ms" not in r:
        return [f"{name} (skipped: {r['skipped']})", *[None] * (len(COLUMNS) - 1)]
    others = [f"{r[f'of_{o}']:.2f} {o}" for o in ("transformers", "accelerate", "understudy_noprefetch")
              if f"of_{o}" in r]  # fmt: skip
    hit = r.get("hit_rate")
    return [
        name, r["tpot_ms"], r["tpot_min_ms"], r["tpot_max_ms"], r["ttft_ms"],
        r["bytes_per_token"] / 1e6, None if hit is None else 100 * hit, r.get("stall_ms"),
        r["rss_bytes"] // 2**20 if r["rss_bytes"] else None, r.get("floor_own_ms"),
        r.get("floor_belady_ms"), r.get("over_floor_own"), r.get("bytes_over_belady"),
        r.get("of_llama_cpp"), ", ".join(others) or None,
    ]  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", default=None, help=f"default: {CELLS}")
    parser.add_argument("--contestants", help="default: all that make sense in a cell")
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds (5)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt (512)")
    parser.add_argument("--new", type=int, default=48, help="tokens of an answer (48)")
    parser.add_argument("--seconds", type=float, default=12.0, help="a peer's round ends then (12)")
    parser.add_argument("--json", action="store_true", help="only the last line, the JSON")
    parser.add_argument("--smoke", action="store_true", help="small and quick; times mean little")
    return parser.parse_args()


def measure(cell: Cell, a: argparse.Namespace) -> list[Record]:
    model = twins.twin(cell.model, smoke=a.smoke)
    default = PEERLESS if a.smoke else IN_RAM if cell.fraction is None else LIMITED
    everybody = named(a.contestants.split(",") if a.contestants else default)
    prompts = twins.prompts(model, a.repeats + 1, a.prompt)
    return run_cell(cell, model, everybody, prompts, a.new, a.seconds, limit=not a.smoke)


def main() -> None:
    a = arguments()
    if a.smoke:
        a.repeats, a.prompt, a.new = min(a.repeats, 2), min(a.prompt, 64), min(a.new, 16)
    cells = [
        Cell.parse(c) for c in (a.cells or ("fine:ram,fine:33" if a.smoke else CELLS)).split(",")
    ]
    facts = {"prompt": f"{a.prompt} tokens of real text", "answer": f"{a.new} tokens",
             "rounds": f"{a.repeats} counted, alternating"}  # fmt: skip
    if not a.json:
        card.show_card("decode", facts)
    every: list[dict[str, Any]] = []
    lines = []
    for cell in cells:
        rows = [row(cell, record) for record in measure(cell, a)]
        compare(rows)
        every += rows
        lines += [shown(cell, r) for r in rows]
    if not a.json:
        print(card.table(COLUMNS, lines))
        print()
    card.last_line({"bench": "decode", "machine": card.machine(), **facts, "cells": every})


if __name__ == "__main__":
    main()
