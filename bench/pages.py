"""The tables of the pages, made of what the benches wrote.

    python bench/pages.py [--check]

In README.md and docs/*.md a table stands between lines ``<!-- results: FILE KIND -->`` and
``<!-- end -->``; it is written anew from docs/results/FILE. ``--check`` writes nothing and fails
where a page says something else than its results. Kinds:

    decode, prefill, start    all rows, the columns of that bench
    ratios                    the ratios that have a target
    beside                    ours and each peer's time per token, a cell and format per row
    buddy, speculation        what bench/policies.py found: quality, and speed on the twin
    recall, layers            what a profile says of each layer
    gpu, targets, parts       what bench/gpu.py found: cells; what was aimed at; kernels alone
    served, replay            what bench/serve.py found; what ``understudy bench serve`` said
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

from bench import show
from bench.device import figures

Row = dict[str, Any]
BLOCK = re.compile(r"(<!-- results: (\S+) (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
# Our name, its format, and who computes the same weights.
PAIRS = (
    ("understudy", "bf16", "llama.cpp-bf16"),
    ("understudy-int8", "int8 / Q8_0", "llama.cpp-q8_0"),
    ("understudy-int4", "int4 / Q4_0", "llama.cpp-q4_0"),
)
OTHERS = ("transformers", "accelerate")


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def columns(known: Sequence[tuple[str, Callable[[Row], str]]]) -> Callable[[Any], str]:
    def made(results: Any) -> str:
        rows = [row for row in results["cells"] if row.get("rounds")]
        lines = [[show_one(row) for _, show_one in known] for row in rows]
        return markdown([name for name, _ in known], lines)

    return made


def ratios(results: Any) -> str:
    return markdown(("ratio", ""), [(n, f"{v:.2f}") for n, v in results["ratios"].items()])


def beside(results: Any) -> str:
    """The faster of a row in bold."""
    by_cell: dict[tuple[str, str], Row] = {}
    for row in results["cells"]:
        if row.get("rounds"):
            by_cell[show.cell_name(row), row["contestant"]] = row
    lines = []
    for cell in dict.fromkeys(cell for cell, _ in by_cell):
        for own, format, peer in PAIRS:
            others = [by_cell.get((cell, name)) for name in OTHERS if own == "understudy"]
            found = [by_cell.get((cell, own)), by_cell.get((cell, peer)), *filter(None, others)]
            if found[0] is not None and len(list(filter(None, found))) > 1:
                lines.append([cell, format, *_times(found)])
    head = ("ms per token", "experts", "Understudy", "llama.cpp", "transformers, accelerate")
    return markdown(head, lines)


def _times(rows: Sequence[Row | None]) -> list[str]:
    best = min(row["tpot_ms"] for row in rows if row is not None)
    shown = []
    for row in [*rows, None][:3]:
        if row is None:
            shown.append("")
            continue
        mark = "**" if row["tpot_ms"] == best else ""
        least, most = show.ms(row["tpot_min_ms"]), show.ms(row["tpot_max_ms"])
        shown.append(f"{mark}{show.ms(row['tpot_ms'])}{mark} ({least}-{most})")
    return shown


POLICY_HEAD = (
    "held", "policy", "NLL lost (95 %)", "KL", "same top-1", "changed", "mass", "beyond random",
    "beyond drop", "read", "time",
)  # fmt: skip


def policies(table: str) -> Callable[[Any], str]:
    """Bytes and time as shares of `on-demand` with the same experts held."""

    def made(results: Any) -> str:
        rows = results[table]
        base = {r["share"]: r["bytes"] for r in rows if r["policy"] == "on-demand" and "bytes" in r}
        return markdown(POLICY_HEAD, [_policy(row, base.get(row["share"])) for row in rows])

    return made


def _policy(row: Row, base: float | None) -> list[str]:
    speed, lost = row.get("speed"), row.get("delta_nll")
    time = ""
    if speed:
        low, high = speed["spread"]
        time = f"{speed['ratio']:.2f} ({low:.2f}-{high:.2f})"
    if lost is None:  # timed only
        read = f"{speed['bytes'] / speed['baseline_bytes']:.2f}" if speed else ""
        return [row["share"], f"`{row['policy']}`", *[""] * 7, read, time]
    exact = row["exact"] and row["identical"]
    beyond = row["beyond"]
    return [
        row["share"],
        f"`{row['policy']}`",
        "exact" if exact else _with_interval(lost),
        "" if exact else f"{row['kl']['mean']:.3f}",
        "" if exact else f"{100 * row['same_top1']['mean']:.1f} %",
        "" if exact else f"{row['substituted'] + row['skipped']:.2f}",
        "" if exact else f"{row['substituted_mass'] + row['skipped_mass']:.2f}",
        *(_control(beyond, who) for who in ("random", "drop")),
        f"{row['bytes'] / base:.2f}" if base else "",
        time,
    ]


def _control(beyond: Row, who: str) -> str:
    found = [figure for name, figure in beyond.items() if name.endswith(f"({who})")]
    return _with_interval(found[0]) if found else ""


def _with_interval(figure: Row) -> str:
    return f"{figure['mean']:+.3f} ({figure['low']:+.3f}..{figure['high']:+.3f})"


def recall(facts: Any) -> str:
    """Percent of a layer's chosen experts that each foresight guessed; by weight in brackets; what
    guessed most in bold."""
    names, lines = list(facts["recall"]), []
    for layer in range(facts["layers"]):
        both = [(facts["recall"][n][layer], facts["weighted_recall"][n][layer]) for n in names]
        best = max(x for x, _ in both if x is not None)
        lines.append([str(layer), *(_guessed(x, weight, x == best) for x, weight in both)])
    return markdown(["layer", *names], lines)


def _guessed(share: float | None, weight: float | None, best: bool) -> str:
    if share is None or weight is None:
        return ""
    mark = "**" if best else ""
    return f"{mark}{100 * share:.1f}{mark} ({100 * weight:.1f})"


def layers(facts: Any) -> str:
    names, lines = list(facts["cosine"]), []
    for layer, nats in enumerate(facts["sensitivity"]):
        cosines = [facts["cosine"][name][layer] for name in names]
        shown = ["" if x is None else f"{x:.3f}" for x in cosines]
        alike = facts["similarity"]["rows_over_all_tokens"][layer]
        rare = facts["rarely_chosen"][layer], facts["never_chosen"][layer], alike
        lines.append([str(layer), *shown, f"{nats:.5f}", *map(str, rare)])
    few = f"under {facts['smoothing']:g} tokens"
    head = [
        "layer",
        *(f"cosine, {n}" for n in names),
        "nats per token",
        few,
        "never",
        "few in sample",
    ]
    return markdown(head, lines)


def accountings(results: Any) -> str:
    """A published curve beside ours: hits of all lookups, in percent."""
    ways = "published", "ours_published_accounting", "ours_event_atomic"
    budgets: dict[int, dict[str, Row]] = {}
    for row in results["rows"]:
        budgets.setdefault(row["memory_bytes"], {})[row["policy"]] = row
    policies = list(dict.fromkeys(row["policy"] for row in results["rows"]))
    lines = [
        [
            f"{budget >> 20}",
            *(" / ".join(f"{rows[name][way]['hit_pct']:.1f}" for way in ways) for name in policies),
        ]
        for budget, rows in sorted(budgets.items())
    ]
    return markdown(["MiB", *policies], lines)


def simulated(results: Any) -> str:
    """Rows of ``understudy simulate``."""
    total = results["expert_bytes"]
    lines = [
        [
            f"{100 * row['memory_bytes'] / total:.0f} %",
            f"{row['link_bytes_per_second'] / 1e9:.3g}",
            row["policy"],
            f"{100 * row['hit_rate_decode']:.1f}",
            f"{row['bytes_per_token'] / 2**20:.0f}",
            *(f"{row[name]:.1f}" for name in ("tpot_ms", "stall_ms", "floor_own_ms")),
        ]
        for row in results["rows"]
    ]
    head = (
        "memory",
        "link, GB/s",
        "policy",
        "hits, %",
        "MiB",
        "TPOT, ms",
        "stall, ms",
        "own floor",
    )
    return markdown(head, lines)


def seconds(results: Any) -> str:
    """Rows of ``bench/simulator.py``."""
    lines = [
        [row["policy"], f"{100 * row['hit_rate']:.1f}", f"{row['cpu_seconds']:.0f}"]
        for row in results["cells"]
    ]
    return markdown(("policy", "hits, %", "seconds"), lines)


def listed(name: str, known: Sequence[figures.Column]) -> Callable[[Any], str]:
    """A list of the results, all of it."""

    def made(results: Any) -> str:
        lines = [[shown(row) for _, shown in known] for row in results[name]]
        return markdown([head for head, _ in known], lines)

    return made


def served(results: Any) -> str:
    """Batches beside the bytes that their routing needs."""
    lines = [
        [
            row["model"],
            str(row["batch"]),
            f"**{row['tokens_per_second']:.1f}** "
            f"({row['tokens_per_second_min']:.1f}-{row['tokens_per_second_max']:.1f})",
            f"{row['bound_tokens_per_second']:.1f}",
            f"{row['of_bound']:.2f}",
            *(show.size(row[name]) for name in ("union_bytes", "bound_bytes", "read_bytes")),
        ]
        for row in results["rows"]
    ]
    head = (
        "model", "batch", "tokens/s (min-max)", "byte bound", "of it", "union per step",
        "of it missed", "read",
    )  # fmt: skip
    return markdown(head, lines)


REPLAYED = {"ttft": "TTFT", "tpot": "TPOT", "itl": "between tokens", "e2el": "whole request"}


def replay(results: Any) -> str:
    """Milliseconds, by what a client saw."""
    lines = [
        [name, *(show.ms(results[f"{which}_{key}_ms"]) for which in ("median", "p90", "p99"))]
        for key, name in REPLAYED.items()
    ]
    return markdown(("ms", "p50", "p90", "p99"), lines)


KINDS: dict[str, Callable[[Any], str]] = {
    "decode": columns(show.DECODE_COLUMNS),
    "prefill": columns(show.PREFILL_COLUMNS),
    "start": columns(show.START_COLUMNS),
    "ratios": ratios,
    "beside": beside,
    "buddy": policies("buddy"),
    "speculation": policies("speculation"),
    "recall": recall,
    "layers": layers,
    "accountings": accountings,
    "simulated": simulated,
    "seconds": seconds,
    "gpu": columns(figures.COLUMNS),
    "targets": listed("targets", figures.TARGET_COLUMNS),
    "parts": listed("micro", figures.MICRO_COLUMNS),
    "served": served,
    "replay": replay,
}


def rewritten(page: str, results: Path) -> str:
    """The text of a page with its tables made anew. ``results``: the folder of the numbers."""

    def table(match: re.Match[str]) -> str:
        begin, file, kind, _, end = match.groups()
        found = json.loads((results / file).read_text(encoding="utf-8").splitlines()[-1])
        return f"{begin}{KINDS[kind](found)}{end}"

    return BLOCK.sub(table, page)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, fail on a difference")
    check, stale = parser.parse_args().check, []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        new = rewritten(text, ROOT / "docs" / "results")
        if new != text:
            stale.append(page.name)
            if not check:
                page.write_text(new, encoding="utf-8")
    print(f"{'different' if check else 'written'}: {', '.join(stale) or 'none'}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
