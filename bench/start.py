"""How long from a started process to its first token, beside reading the bytes it needs?

    python bench/start.py [--cells fine:33,fine:ram] [--contestants understudy,llama.cpp-bf16]
                          [--repeats 5] [--prompt-tokens 32] [--smoke] [--json]

Each start is a new process that has done its imports and nothing else; the model's files are out
of the page cache, contestants take turns. Floor: dense weights and the experts that the prompt
touches (as Understudy counts them), read once at the best bandwidth seen, its own included. The
first start is not counted: it may compile what later ones find in a cache. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import card as cards
from bench import cells as places
from bench import contest, page_cache, show
from bench.cells import Cell
from bench.contestants import CannotRun, Contestant, chosen, prepared
from bench.match import Limits, Rates
from bench.memory_limit import why_not
from bench.process import Process
from understudy.core import UnderstudyError

Start = dict[str, Any]


def one_start(
    cell: Cell, contestant: Contestant, path: Path, prompt: Sequence[int], limits: Limits
) -> Start:
    """A new process, a cold file, one token."""
    page_cache.forget(places.weight_files(path))
    with Process(contestant.name, contestant.runner, limits.cgroup) as process:
        process.ask("imports")
        options = dict(contestant.options) | (
            {} if contestant.own else {"scratch": str(path.parent)}
        )
        memory = limits.budget if contestant.told else None
        facts = process.ask("load", model=str(path), memory=memory, options=options)
        lap = process.ask("round", prompt=list(prompt), answer=[prompt[0]], seconds=0.0)
    return {
        "load": facts["seconds"],
        "first": lap["ttft"],
        "once": lap["prompt_once_bytes"],
        "link_rate": lap.get("link_rate"),
    }


def row(
    cell: Cell, contestant: Contestant, starts: Sequence[Start], rates: Rates, dense: int
) -> dict[str, Any]:
    """Medians over the counted starts, and what reading alone would have taken."""
    totals = [one["load"] + one["first"] for one in starts]
    once = starts[0]["once"]
    floor = None if once is None else rates.floor(dense + once, 0.0)
    return {
        "model": cell.model,
        "budget_fraction": cell.fraction,
        "contestant": contestant.name,
        "format": contestant.format,
        "skipped": None,
        "rounds": len(starts),
        "load_s": median(one["load"] for one in starts),
        "first_s": median(one["first"] for one in starts),
        "start_s": median(totals),
        "start_min_s": min(totals),
        "start_max_s": max(totals),
        "floor_s": floor,
        "over_s": None if floor is None else median(totals) - floor,
    }


def one_cell(cell: Cell, options: argparse.Namespace, card: dict[str, Any]) -> list[Any]:
    """Every contestant in turns; a missing one is a skipped row."""
    twin = places.twin(cell.model, show.progress, options.smoke)
    enforced = not options.smoke and why_not() is None
    limits = Limits.of(cell, places.stored_bytes(twin), enforced)
    facts = card["models"][cell.model]
    rates = Rates(places.weight_files(twin)[0], min(8 << 20, facts["expert_bytes"]))
    prompt = contest.texts(twin, 1, options.prompt_tokens, 1).prompts[0]
    ready, rows, starts = [], [], {}
    for contestant in chosen(options.contestants):
        if contestant.runs_in(cell) and (contestant.own or not options.smoke):
            try:
                ready.append((contestant, prepared(contestant, twin, show.progress)))
            except CannotRun as reason:
                rows.append(_skipped(cell, contestant, str(reason)))
    report = show.progress(f"{cell.name}: starts")
    for number in range(options.repeats + 1):
        for contestant, path in ready:
            try:
                start = one_start(cell, contestant, path, prompt, limits)
                rates.saw(start["link_rate"])
            except CannotRun as reason:
                start = {"error": str(reason)}
            if number > 0:
                starts.setdefault(contestant.name, []).append(start)
        rates.measure()
        report(number + 1, options.repeats + 1)
    for contestant, _ in ready:
        found = starts[contestant.name]
        errors = [one["error"] for one in found if "error" in one]
        if errors:
            rows.append(_skipped(cell, contestant, errors[0]))
        else:
            rows.append(row(cell, contestant, found, rates, facts["dense_bytes"]))
    return rows


def _skipped(cell: Cell, contestant: Contestant, reason: str) -> dict[str, Any]:
    return {
        "model": cell.model,
        "budget_fraction": cell.fraction,
        "contestant": contestant.name,
        "format": contestant.format,
        "skipped": reason,
    }


def main() -> int:
    parser = contest.arguments((__doc__ or "").splitlines()[0], "fine:33,fine:ram")
    parser.set_defaults(contestants="understudy,llama.cpp-bf16", prompt_tokens=32)
    if "--smoke" in sys.argv:
        parser.set_defaults(cells="fine:33", repeats=2, contestants="understudy")
    options = parser.parse_args()
    try:
        cells = places.parse_cells(options.cells)
        models = {c.model: places.twin(c.model, show.progress, options.smoke) for c in cells}
        card = cards.card(models, f"{options.repeats} starts and one to warm up, in turns")
        cards.show(card)
        rows = [found for cell in cells for found in one_cell(cell, options, card)]
    except UnderstudyError as error:
        show.say(f"error: {error}")
        return 2
    if not options.json:
        print(show.table(rows, show.START_COLUMNS))
    last = json.dumps({"cells": rows, "card": card})
    if options.output:
        options.output.write_text(last + "\n", encoding="utf-8")
    print(last)
    return 0


if __name__ == "__main__":
    sys.exit(main())
