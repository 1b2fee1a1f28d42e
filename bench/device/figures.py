"""Rounds become rows: medians, floors, shares, targets. Plain values only.

Knows: what each column and each target means. Does not know: engines, devices, processes.

The lossless floor of one token is the longer of two times that overlap: every byte of weights that
the token reads, at the bandwidth of device memory; every byte this way had to bring, at the
bandwidth of the copy engine. Bandwidths are the best seen in this run. Where the CPU computes some
of the misses, their bytes at the bandwidth of CPU memory are a third.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from bench import show
from bench.device.host_time import per_layer
from bench.device.ways import EXACT, PAPER, RESIDENT

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """One way, one round. Seconds and bytes of the whole decode phase, but for ``ttft`` and
    ``prompt_bytes``. ``device_seconds``: the same time by the device's own clock. ``needed_bytes``:
    what was brought, less what turned out useless; ``cpu_bytes``: weights of the misses that the
    CPU computed. ``None``: this way cannot say."""

    steps: int
    seconds: float
    ttft: float
    device_seconds: float | None = None
    read_bytes: int | None = None
    needed_bytes: int | None = None
    cpu_bytes: int = 0
    lookups: int | None = None
    hits: int | None = None
    late: int | None = None
    stall_seconds: float | None = None
    prompt_bytes: int | None = None

    @property
    def tpot(self) -> float:
        """By the device's clock where it has one."""
        seconds = self.seconds if self.device_seconds is None else self.device_seconds
        return seconds / self.steps if self.steps else 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Facts:
    """Of a model. ``resident_bytes``: all that is not experts; ``dense_bytes``: what of it is read
    for every token, which of an untied embedding is one row."""

    layers: int
    experts: int
    top_k: int
    expert_bytes: int
    resident_bytes: int
    dense_bytes: int
    trained: bool
    words: str

    @property
    def all_expert_bytes(self) -> int:
        return self.experts * self.expert_bytes

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Rates:
    """Bytes per second, the best seen; ``None``: not measured. ``link``: the copy engine, from
    pinned memory."""

    device: float | None = None
    link: float | None = None
    cpu: float | None = None


# ---------------------------------------------------------------------------------------- one row


def row(head: Row, turns: Sequence[Turn], facts: Facts, rates: Rates) -> Row:
    """``head``: model, budget_fraction, contestant, and what is known beside the times."""
    if not turns:
        return {**head, "rounds": 0}
    steps = sum(turn.steps for turn in turns) or 1
    times = [turn.tpot for turn in turns]
    read = _total(turns, "read_bytes")
    floor = floor_of(turns, facts, rates)
    lookups = _total(turns, "lookups")
    return {
        **head,
        "rounds": len(turns),
        "clock": "host" if turns[0].device_seconds is None else "device",
        "tpots_ms": [_ms(value) for value in times],
        "tpot_ms": _ms(median(times)),
        "tpot_min_ms": _ms(min(times)),
        "tpot_max_ms": _ms(max(times)),
        "bytes_per_token": None if read is None else round(read / steps),
        "hit_rate": _ratio(_total(turns, "hits"), lookups),
        "late_rate": _ratio(_total(turns, "late"), lookups),
        "stall_ms": _ms(_each(_total(turns, "stall_seconds"), steps)),
        "link_share": _ratio(_each(read, steps), _product(rates.link, median(times))),
        "floor_ms": _ms(floor),
        "over_floor": _ratio(median(times), floor),
    }


def floor_of(turns: Sequence[Turn], facts: Facts, rates: Rates) -> float | None:
    """Seconds per token; ``None`` where something it needs was not measured."""
    steps = sum(turn.steps for turn in turns) or 1
    lookups, needed = _total(turns, "lookups"), _total(turns, "needed_bytes")
    if lookups is None or needed is None or not rates.device or not rates.link:
        return None
    cpu = sum(turn.cpu_bytes for turn in turns)
    touched = facts.dense_bytes + (lookups * facts.expert_bytes - cpu) / steps
    times = [touched / rates.device, needed / steps / rates.link]
    if cpu:
        if not rates.cpu:
            return None
        times.append(cpu / steps / rates.cpu)
    return float(max(times))


def ratio(one: Row, other: Row) -> float | None:
    """How many times longer ``one`` takes. Where both were timed in turns, the median of the ratios
    of their rounds; else the ratio of their medians."""
    if not one.get("rounds") or not other.get("rounds"):
        return None
    if one.get("group") is not None and one.get("group") == other.get("group"):
        pairs = zip(one["tpots_ms"], other["tpots_ms"], strict=False)
        return float(median(a / b for a, b in pairs))
    return float(one["tpot_ms"] / other["tpot_ms"])


# ---------------------------------------------------------------------------------------- targets


@dataclass(frozen=True, slots=True)
class Target:
    """``most``: the figure may be at most ``must``; else it must be at least that. ``value`` is
    ``None`` where nothing it needs was run."""

    name: str
    must: float
    aim: float
    most: bool
    value: float | None
    where: str = ""

    def _meets(self, bound: float) -> str:
        if self.value is None:
            return "not run"
        return "yes" if (self.value <= bound if self.most else self.value >= bound) else "NO"

    def as_dict(self) -> Row:
        return {**asdict(self), "met": self._meets(self.must), "aim_met": self._meets(self.aim)}


def targets(rows: Sequence[Row], micro: Mapping[str, Any], prefill: Sequence[Row]) -> list[Target]:
    """The table of targets, each with the value that is hardest to meet among the cells played."""
    return [
        *_against_the_paper(rows),
        _worst_floor(rows, "host", 1.6, 1.3),
        _worst_floor(rows, "device", 1.3, 1.1),
        _host_time(rows),
        _one("expert kernel, 1 token, bf16: share of device bandwidth", 0.70, 0.85, False,
             micro.get("expert bf16", {}).get("share")),
        _one("gather kernel: share of the copy engine's bandwidth", 0.85, 0.95, False,
             micro.get("gather", {}).get("share")),
        *_prefill_targets(prefill),
    ]  # fmt: skip


def _against_the_paper(rows: Sequence[Row]) -> Iterable[Target]:
    """At 50 %, for each model: our fastest way with exact output, against Router-PF."""
    name = "TPOT at 50 %: Router-PF / ours, exact"
    cells = list(dict.fromkeys(row["model"] for row in rows)) or [""]
    for model in cells:
        half = [r for r in rows if r["model"] == model and r["budget_fraction"] == 0.5]
        cell = [r for r in half if r.get("rounds")]
        paper = next((r for r in cell if r["contestant"] == PAPER), None)
        found = [
            (times, r["contestant"])
            for r in cell
            if _is_exact(r) and paper is not None and (times := ratio(paper, r)) is not None
        ]
        best, way = max(found, default=(None, ""))
        yield Target(name, 2.0, 4.0, False, best, f"{model} {way}".strip())


def _is_exact(row: Row) -> bool:
    """Ours, bit by bit what the resident run says. The resident run itself has no budget."""
    ours = row["contestant"] not in (RESIDENT, "accelerate", "on-demand")
    return ours and row["promise"] == EXACT and row.get("exact") == "yes"


def _worst_floor(rows: Sequence[Row], driven: str, must: float, aim: float) -> Target:
    """The best way of each cell that is driven so, and of these the worst."""
    cells: dict[str, list[float]] = {}
    for one in rows:
        if one["driven"] == driven and _is_exact(one) and one.get("over_floor") is not None:
            cells.setdefault(show.cell_name(one), []).append(one["over_floor"])
    name = f"measured / lossless floor, {driven}-driven"
    return _hardest(name, must, aim, True, ((c, min(found)) for c, found in cells.items()))


def _host_time(rows: Sequence[Row]) -> Target:
    """Of the device-driven way; `host_time` says what per layer means."""
    found = per_layer([row for row in rows if row["driven"] == "device"])
    value, where = found or (None, "")
    name = "host us per layer and token, device-driven"
    return Target(name, 0.0, 0.0, True, value, where)


def _prefill_targets(rows: Sequence[Row]) -> Iterable[Target]:
    by_way = {row["contestant"]: row for row in rows if row.get("rounds")}
    ours, peer = by_way.get("lru+hint"), by_way.get("accelerate")
    name = "prefill of 2,048 tokens at 25 %"
    faster = ours["ttft_ms"] if ours else None
    times = peer["ttft_ms"] / faster if peer and faster else None
    yield _one(f"{name}: accelerate / ours", 5.0, 5.0, False, times)
    over = ours.get("over_pass") if ours else None
    # No must of its own: the aim stands in both columns.
    yield _one(f"{name}: time / one pass over the bytes", 1.1, 1.1, True, over)


def _one(name: str, must: float, aim: float, most: bool, value: float | None) -> Target:
    return Target(name, must, aim, most, value)


def _hardest(
    name: str, must: float, aim: float, most: bool, found: Iterable[tuple[str, float | None]]
) -> Target:
    """The one that is hardest to meet."""
    known = [(value, where) for where, value in found if value is not None]
    if not known:
        return Target(name, must, aim, most, None)
    value, where = max(known) if most else min(known)
    return Target(name, must, aim, most, value, f"{where}, worst of {len(known)}")


# ----------------------------------------------------------------------------------------- tables

Column = tuple[str, Callable[[Row], str]]

COLUMNS: tuple[Column, ...] = (
    ("cell", lambda r: show.cell_name(r)),
    ("row", lambda r: r["contestant"]),
    ("class", lambda r: r["promise"]),
    ("TPOT ms", lambda r: shown(r["tpot_ms"])),
    ("min-max", lambda r: f"{shown(r['tpot_min_ms'])}-{shown(r['tpot_max_ms'])}"),
    ("read/token", lambda r: show.size(r["bytes_per_token"])),
    ("hits", lambda r: show.percent(r["hit_rate"])),
    ("stall ms", lambda r: shown(r["stall_ms"])),
    ("link", lambda r: show.percent(r["link_share"])),
    ("floor ms", lambda r: shown(r["floor_ms"])),
    ("x floor", lambda r: show.times(r["over_floor"])),
    ("exact", lambda r: r.get("exact") or "-"),
    ("NLL", lambda r: "-" if r.get("delta_nll") is None else f"{r['delta_nll']:+.3f}"),
)
PREFILL_COLUMNS: tuple[Column, ...] = (
    ("cell", lambda r: show.cell_name(r)),
    ("row", lambda r: r["contestant"]),
    ("class", lambda r: r["promise"]),
    ("TTFT ms", lambda r: shown(r["ttft_ms"])),
    ("min-max", lambda r: f"{shown(r['ttft_min_ms'])}-{shown(r['ttft_max_ms'])}"),
    ("read", lambda r: show.size(r["prompt_bytes"])),
    ("one pass ms", lambda r: shown(r.get("pass_ms"))),
    ("x pass", lambda r: show.times(r.get("over_pass"))),
)
MICRO_COLUMNS: tuple[Column, ...] = (
    ("measured", lambda r: r["name"]),
    ("of", lambda r: r.get("of", "")),
    ("with", lambda r: r.get("how", "")),
    ("GB/s", lambda r: "-" if r["rate"] is None else f"{r['rate'] / 1e9:,.1f}"),
    ("share", lambda r: show.percent(r.get("share"))),
)
TARGET_COLUMNS: tuple[Column, ...] = (
    ("target", lambda r: r["name"]),
    ("where", lambda r: r["where"]),
    ("met", lambda r: r["met"]),
    ("value", lambda r: "-" if r["value"] is None else f"{r['value']:.2f}"),
    ("must", lambda r: f"{'<=' if r['most'] else '>='} {r['must']:g}"),
    ("aim", lambda r: f"{r['aim']:g} {r['aim_met']}"),
)


def prefill_row(head: Row, turns: Sequence[Turn], once_bytes: int | None, rates: Rates) -> Row:
    """``once_bytes``: of the experts that the prompt touches, each once; some may be there from
    the round before."""
    if not turns:
        return {**head, "rounds": 0}
    found = [turn.ttft for turn in turns]
    one_pass = None if once_bytes is None or not rates.link else once_bytes / rates.link
    return {
        **head,
        "rounds": len(turns),
        "ttfts_ms": [_ms(value) for value in found],
        "ttft_ms": _ms(median(found)),
        "ttft_min_ms": _ms(min(found)),
        "ttft_max_ms": _ms(max(found)),
        "prompt_bytes": _each(_total(turns, "prompt_bytes"), len(turns)),
        "once_bytes": once_bytes,
        "pass_ms": _ms(one_pass),
        "over_pass": _ratio(median(found), one_pass),
    }


def shown(ms: float | None) -> str:
    """Two decimals: a device's token takes a few milliseconds."""
    return "-" if ms is None else f"{ms:.2f}" if ms < 100 else f"{ms:,.0f}"


def _total(turns: Sequence[Turn], field: str) -> Any:
    values = [getattr(turn, field) for turn in turns]
    return None if None in values else sum(values)


def _each(total: float | None, count: int) -> float | None:
    return None if total is None else total / count


def _product(one: float | None, other: float) -> float | None:
    return None if one is None else one * other


def _ratio(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else round(one / other, 4)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 4)
