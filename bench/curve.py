"""How does the cost of a token grow: with less memory, and with more experts?

    python bench/curve.py [--repeats 3] [--only budget|experts]

Two plots into docs/img/ and their numbers into docs/results/, each point beside its floor:

    budget    the wide twin of `fine`, memory from 10 % of the model to all of it
    experts   8 to 128 experts per layer, the same active bytes and the same memory; random weights,
              which route nearly uniformly: this says how cost grows, not how a real model caches

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from bench import card as cards
from bench import cells as places
from bench import contest, show, synthetic
from bench.cells import Cell
from bench.contestants import ANCHOR, chosen
from bench.match import Rates, play
from bench.memory_limit import why_not
from bench.rows import decode_rows
from understudy.core import UnderstudyError

SHARES = (10.0, 15.0, 25.0, 33.0, 50.0, 67.0, 85.0, None)
EXPERTS = (8, 16, 32, 64, 128)
MEMORY = 256 << 20  # of the second plot: a good part of the smallest model, a sliver of the largest
Row = dict[str, Any]


def point(cell: Cell, model: Path, options: argparse.Namespace, card: dict[str, Any]) -> Row:
    """One cell, played by Understudy alone."""
    facts = cards.card({cell.model: model})["models"][cell.model]
    card["models"][model.name] = facts
    course = contest.texts(model, options.repeats + 1, options.prompt_tokens, options.new_tokens)
    rates = Rates(places.weight_files(model)[0], min(8 << 20, facts["expert_bytes"]))
    limited = why_not() is None
    # Compiled for every point: by itself the engine leaves small models eager, and the curve would
    # then show where it changes its mind.
    own = [replace(chosen(ANCHOR)[0], options={"frame": "compiled"})]
    score = play(cell, model, own, course, rates, show.progress, show.say, limited=limited)
    (row,) = decode_rows(score, facts["active_bytes"], places.stored_bytes(model))
    if not row.get("rounds"):
        raise UnderstudyError(f"{cell.name} could not be measured: {row['skipped']}")
    return row | {"experts_per_layer": facts["experts_per_layer"]}


def over_budgets(options: argparse.Namespace, card: dict[str, Any]) -> list[Row]:
    model = places.twin("fine", show.progress)
    return [point(Cell("fine", share), model, options, card) for share in SHARES]


def over_experts(options: argparse.Namespace, card: dict[str, Any]) -> list[Row]:
    rows = []
    for count in EXPERTS:
        model = synthetic.checkpoint(count, show.progress)
        share = 100 * MEMORY / places.stored_bytes(model)
        cell = Cell(model.name, share if share < 100 else None)
        rows.append(point(cell, model, options, card))
    return rows


def draw(rows: Sequence[Row], xs: Sequence[float], label: str, title: str, path: Path) -> None:
    """Measured with its spread, and both floors."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    middle = [row["tpot_ms"] for row in rows]
    below = [row["tpot_ms"] - row["tpot_min_ms"] for row in rows]
    above = [row["tpot_max_ms"] - row["tpot_ms"] for row in rows]
    axes.errorbar(xs, middle, [below, above], marker="o", capsize=3, label="measured (min-max)")
    axes.plot(xs, [row["floor_own_ms"] for row in rows], "--", label="floor: bytes it missed")
    axes.plot(xs, [row["floor_belady_ms"] for row in rows], ":", label="floor: bytes Belady misses")
    axes.set(xlabel=label, ylabel="ms per token", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("budget", "experts"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=33)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    card = cards.card({}, f"{options.repeats} rounds and one to warm up")
    cards.show(card)
    found: dict[str, list[Row]] = {}
    try:
        if options.only != "experts":
            rows = found["budget"] = over_budgets(options, card)
            xs = [100 * (row["budget_fraction"] or 1.0) for row in rows]
            title = "wide fine, 320 experts of 9.4 MB, real text"
            draw(rows, xs, "memory, % of the model", title, options.docs / "img/budget.png")
        if options.only != "budget":
            rows = found["experts"] = over_experts(options, card)
            xs = [row["experts_per_layer"] for row in rows]
            title = f"{MEMORY >> 20} MiB of memory, equal active bytes, random weights"
            draw(rows, xs, "experts per layer", title, options.docs / "img/experts.png")
    except UnderstudyError as error:
        show.say(f"error: {error}")
        return 2
    last = json.dumps({**found, "card": card})
    name = "-".join(["curve", *([options.only] if options.only else [])])
    path = options.docs / f"results/{date.today()}-{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(last + "\n", encoding="utf-8")
    print(last)
    return 0


if __name__ == "__main__":
    sys.exit(main())
