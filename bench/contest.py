"""What ``decode.py`` and ``prefill.py`` have in common: arguments, texts, cells, the last line.

Knows: how the parts of this folder are put together. Does not know: which columns are shown.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import card as cards
from bench import cells as places
from bench import show
from bench.cells import Cell
from bench.contestants import NAMES, Contestant, chosen
from bench.match import Course, Rates, Score, play
from bench.memory_limit import why_not
from understudy.core import UnderstudyError
from understudy.texts import python_docs

Rows = list[dict[str, Any]]


def main(
    page: str | None,
    cells: str,
    smoke: dict[str, Any],
    to_rows: Callable[[Score, int, int], Rows],
    columns: Sequence[Any],
    ratios: Callable[[Rows], dict[str, float]],
    **defaults: Any,
) -> int:
    """The command: ``page`` is its docstring, ``smoke`` what is different with --smoke."""
    parser = arguments((page or "").splitlines()[0], cells)
    parser.set_defaults(**defaults)
    if "--smoke" in sys.argv:
        parser.set_defaults(**smoke)
    return run(parser.parse_args(), to_rows, columns, ratios)


def arguments(purpose: str, cells: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("--cells", default=cells, help="MODEL:PERCENT or MODEL:ram (%(default)s)")
    parser.add_argument("--contestants", help=f"of {', '.join(NAMES)}; default: all")
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds (%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="(%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=33, help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    parser.add_argument("--smoke", action="store_true", help="small twins, no peers, no limits")
    parser.add_argument("--output", type=Path, help="write the JSON there, too")
    return parser


def run(
    options: argparse.Namespace,
    to_rows: Callable[[Score, int, int], Rows],
    columns: Sequence[Any],
    ratios: Callable[[Rows], dict[str, float]],
) -> int:
    """Card, cells, table, ratios, last line. The exit code."""
    try:
        cells, contestants = _asked(options)
        models = {
            cell.model: places.twin(cell.model, show.progress, options.smoke) for cell in cells
        }
        card = cards.card(models, _note(options))
        cards.show(card)
        rows: Rows = []
        for cell in cells:
            rows += _one_cell(cell, models[cell.model], contestants, options, card, to_rows)
    except UnderstudyError as error:
        show.say(f"error: {error}")
        return 2
    found = ratios(rows)
    if not options.json:
        print(show.table(rows, columns))
        print()
        print(show.ratios_text(found))
    last = json.dumps({"cells": rows, "ratios": found, "card": card})
    if options.output:
        options.output.write_text(last + "\n", encoding="utf-8")
    print(last)
    return 0


def _asked(options: argparse.Namespace) -> tuple[list[Cell], list[Contestant]]:
    cells = places.parse_cells(options.cells)
    contestants = chosen(options.contestants)
    if options.smoke:
        contestants = [one for one in contestants if one.own]
    return cells, contestants


def _note(options: argparse.Namespace) -> str:
    limits = (
        "memory: limited by its own budget only"
        if options.smoke
        else f"memory: cgroup of fraction x model + {places.BESIDE_BYTES >> 20} MiB each"
    )
    return (
        f"{options.repeats} rounds and one to warm up, in turns; {options.prompt_tokens} tokens of "
        f"real text, then {options.new_tokens} more of it, dictated to everybody; {limits}"
    )


def _one_cell(
    cell: Cell,
    twin: Path,
    contestants: Sequence[Contestant],
    options: argparse.Namespace,
    card: dict[str, Any],
    to_rows: Callable[[Score, int, int], Rows],
) -> Rows:
    reason = None if cell.percent is None or options.smoke else why_not()
    if reason:
        show.say(f"{cell.name}: skipped, {reason}")
        return [
            {"model": cell.model, "budget_fraction": cell.fraction, "contestant": one.name,
             "format": one.format, "skipped": reason}
            for one in contestants if one.runs_in(cell)
        ]  # fmt: skip
    facts = card["models"][cell.model]
    largest = max(twin.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    rates = Rates(largest, min(8 << 20, facts["expert_bytes"]))
    course = texts(twin, options.repeats + 1, options.prompt_tokens, options.new_tokens)
    score = play(
        cell, twin, contestants, course, rates, show.progress, show.say, limited=not options.smoke
    )
    card.setdefault("rates", {})[cell.name] = {
        "disk_bytes_per_second": round(rates.disk),
        "memory_bytes_per_second": round(rates.memory),
    }
    return to_rows(score, facts["active_bytes"], places.stored_bytes(twin))


def texts(model: Path, count: int, prompt_tokens: int, new_tokens: int) -> Course:
    """``count`` different pieces of real text, each cut into what is read and what is written."""
    from transformers import AutoTokenizer

    length = prompt_tokens + new_tokens
    tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=True)
    ids = tokenizer(python_docs()[: 40 * count * length], verbose=False).input_ids
    while len(ids) < count * length:
        ids = ids + ids
    pieces = [ids[i * length : (i + 1) * length] for i in range(count)]
    return Course([p[:prompt_tokens] for p in pieces], [p[prompt_tokens:] for p in pieces])
