"""The arena: policies on one model and one budget, each timed and each scored, and what is best.

Knows: how a policy's speed is measured beside the baseline, how results are kept so that a run that
was interrupted goes on, which entries no other one beats. Does not know: terminals, how quality is
scored (`quality`), what a policy does.

Speed is a ratio in one run: every policy is timed in turns with `on-demand` on the same dictated
text, so that a machine in another mood an hour later changes nothing. Its TPOT is that ratio times
the median of all baselines.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from understudy import bench
from understudy.bench import ON_DEMAND, Policy, Report
from understudy.core import UnderstudyError
from understudy.whole import keep

Bar = Callable[[str], Report]


@dataclass(frozen=True, slots=True)
class Speed:
    """One policy beside the baseline; seconds and bytes per decoded token, one time per round."""

    seconds: tuple[float, ...]
    baseline: tuple[float, ...]
    bytes: float
    baseline_bytes: float
    stall: float
    hit_rate: float

    @property
    def ratio(self) -> float:
        """The median of the rounds' ratios: below 1 is faster than the baseline."""
        return median(a / b for a, b in zip(self.seconds, self.baseline, strict=True))

    @property
    def spread(self) -> tuple[float, float]:
        ratios = [a / b for a, b in zip(self.seconds, self.baseline, strict=True)]
        return min(ratios), max(ratios)


@dataclass(frozen=True, slots=True)
class Quality:
    """One policy against the exact run, per decoded token; the interval is 95 %."""

    delta_nll: float
    delta_low: float
    delta_high: float
    kl: float
    same_top1: float
    substituted: float
    skipped: float
    lost_mass: float
    identical: bool


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the arena. ``why``: the reason where it could not be run. Neither ``exact`` (to the
    bit) nor ``equivalent`` (rounding only): lossy."""

    policy: str
    exact: bool
    speed: Speed | None = None
    quality: Quality | None = None
    why: str = ""
    equivalent: bool = False

    @property
    def broken(self) -> bool:
        """It says that it is exact, and is not."""
        return self.exact and self.quality is not None and not self.quality.identical


Score = Callable[[Policy, Report], Quality]


@dataclass(frozen=True, slots=True)
class Contest:
    """What is compared. ``settings``: further options of the engine. ``exam``: whatever quality
    depends on besides."""

    model: str
    memory: str | int
    rounds: int = 5
    prompt_tokens: int = 128
    new_tokens: int = 33
    settings: tuple[tuple[str, Any], ...] = ()
    exam: tuple[Any, ...] = ()

    def key(self, policy: Policy) -> str:
        """Changes with anything that a kept result depends on."""
        files = [v for _, v in self.settings if isinstance(v, Path)]
        states = [(f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.exists()]
        told = repr((asdict(self), asdict(policy), ON_DEMAND, states))
        return hashlib.sha256(told.encode()).hexdigest()[:12]


def run(
    contest: Contest, policies: Sequence[Policy], folder: Path, score: Score, bar: Bar
) -> list[Entry]:
    """Every policy's entry; those that ``folder`` holds already are not measured again."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for policy in policies:
        kept = folder / f"{_file_name(policy)}-{contest.key(policy)}.json"
        entry = load_entry(kept)
        if entry is None:
            entry = measure(contest, policy, score, bar)
            if entry.why and policy.name == ON_DEMAND.name:
                raise UnderstudyError(entry.why)  # then nothing can be compared
            if not entry.why:
                keep(kept, json.dumps(asdict(entry)))
        entries.append(entry)
    return entries


def measure(contest: Contest, policy: Policy, score: Score, bar: Bar) -> Entry:
    """Time it, then score it. A policy that this model cannot run says why instead."""
    try:
        speed = time_beside_baseline(contest, policy, bar(f"{policy.name}: speed"))
        quality = score(policy, bar(f"{policy.name}: quality"))
    except UnderstudyError as error:
        return Entry(policy.name, policy.exact, why=str(error), equivalent=policy.equivalent)
    return Entry(policy.name, policy.exact, speed, quality, equivalent=policy.equivalent)


def time_beside_baseline(contest: Contest, policy: Policy, report: Report) -> Speed:
    """In turns with `on-demand`, each with the whole budget."""
    both = [ON_DEMAND, policy] if policy.name != ON_DEMAND.name else [ON_DEMAND]
    settings = dict(contest.settings)
    with bench.open_all(contest.model, both, contest.memory, **settings) as engines:
        some = next(iter(engines.values()))
        length = contest.prompt_tokens + contest.new_tokens
        texts = bench.prompts(some, contest.rounds + 1, length)
        timed = bench.alternate(engines, texts, contest.new_tokens, report, dictated=True)
    own, base = timed[policy.name].generations, timed[ON_DEMAND.name].generations
    counters = bench.total(g.decode_counters for g in own)
    before = bench.total(g.decode_counters for g in base)
    tokens = sum(len(g.tokens) - 1 for g in own)
    return Speed(
        seconds=tuple(g.tpot for g in own),
        baseline=tuple(g.tpot for g in base),
        bytes=counters.bytes_read / tokens,
        baseline_bytes=before.bytes_read / tokens,
        stall=counters.stall_seconds / tokens,
        hit_rate=counters.hits / max(1, counters.lookups),
    )


# ------------------------------------------------------------------------------------ the verdict


def tpot(entries: Sequence[Entry]) -> dict[str, float]:
    """Policy -> seconds per token: its ratio times the median baseline of the whole run."""
    timed = [e for e in entries if e.speed is not None]
    everything = [s for e in timed for s in e.speed.baseline]  # type: ignore[union-attr]
    return {e.policy: e.speed.ratio * median(everything) for e in timed}  # type: ignore[union-attr]


def front(entries: Sequence[Entry]) -> set[str]:
    """Names of those that nobody beats: no other is at least as fast and as near to the exact run,
    and better in one of the two. Nearness is the NLL lost; what was gained by luck counts as 0."""
    seconds = tpot(entries)
    marks = {
        e.policy: (seconds[e.policy], max(0.0, e.quality.delta_nll))
        for e in entries
        if e.quality is not None and e.policy in seconds
    }
    return {
        name
        for name, mine in marks.items()
        if not any(
            other[0] <= mine[0] and other[1] <= mine[1] and other != mine
            for other in marks.values()
        )
    }


# ---------------------------------------------------------------------------------------- reports


def draw(entries: Sequence[Entry], title: str) -> bytes:
    """PNG: time per token against what is lost, with intervals; the front joined by a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    seconds, best = tpot(entries), front(entries)
    shown = [e for e in entries if e.quality is not None and e.policy in seconds]
    for e in shown:
        assert e.quality is not None
        q, x = e.quality, 1000 * seconds[e.policy]
        spread = [[max(0.0, q.delta_nll - q.delta_low)], [max(0.0, q.delta_high - q.delta_nll)]]
        colour = "tab:blue" if e.policy in best else "tab:gray"
        marker = "o" if e.exact else "s"
        axes.errorbar([x], [q.delta_nll], spread, marker=marker, color=colour, capsize=2)
        place = (5, 4)
        axes.annotate(e.policy, (x, q.delta_nll), place, textcoords="offset points", fontsize=8)
    line = sorted((1000 * seconds[e.policy], e.quality.delta_nll) for e in shown
                  if e.policy in best and e.quality is not None)  # fmt: skip
    axes.plot([x for x, _ in line], [y for _, y in line], "--", color="tab:blue", alpha=0.5)
    axes.set(xlabel="ms per token", ylabel="NLL lost, nats per token (95 %)", title=title)
    axes.grid(alpha=0.3)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


COLUMNS = (
    "policy", "class", "ms/token", "x on-demand", "min-max", "read/token", "hits", "stall ms",
    "NLL lost", "95 %", "KL", "same top-1", "changed", "mass", "front",
)  # fmt: skip


def cells(entries: Sequence[Entry]) -> list[list[str]]:
    """The table, as text."""
    seconds, best = tpot(entries), front(entries)
    return [_cells(e, seconds, best) for e in entries]


def _cells(e: Entry, seconds: dict[str, float], best: set[str]) -> list[str]:
    kind = "exact" if e.exact else "equivalent" if e.equivalent else "lossy"
    if e.speed is None or e.quality is None:
        return [e.policy, kind, e.why, *[""] * (len(COLUMNS) - 3)]
    s, q = e.speed, e.quality
    low, high = s.spread
    return [
        e.policy,
        kind,
        f"{1000 * seconds[e.policy]:.1f}",
        f"{s.ratio:.2f}",
        f"{low:.2f}-{high:.2f}",
        f"{s.bytes / (1 << 20):.1f} MiB",
        f"{100 * s.hit_rate:.0f} %",
        f"{1000 * s.stall:.1f}",
        f"{q.delta_nll:+.4f}",
        f"{q.delta_low:+.4f}..{q.delta_high:+.4f}",
        f"{q.kl:.4f}",
        f"{100 * q.same_top1:.1f} %",
        f"{q.substituted + q.skipped:.2f}",
        f"{q.lost_mass:.3f}",
        "*" if e.policy in best else "",
    ]


def write_report(
    entries: Sequence[Entry], contest: Contest, about: Sequence[str], folder: Path
) -> None:
    """``report.html`` (one file, the plot inside), ``report.png``, ``report.json``."""
    title = f"{Path(contest.model).name} in {contest.memory}"
    picture = draw(entries, title)
    keep(folder / "report.png", picture)
    kept = json.dumps(as_dict(entries, contest, about), indent=1, default=str)
    keep(folder / "report.json", kept + "\n")
    keep(folder / "report.html", _page(entries, title, about, picture))


def as_dict(entries: Sequence[Entry], contest: Contest, about: Sequence[str]) -> dict[str, Any]:
    """All of it as plain values."""
    told = asdict(contest)
    told["settings"] = {name: None if v is None else str(v) for name, v in contest.settings}
    told["model"] = Path(contest.model).name
    return {
        "contest": told,
        "about": list(about),
        "front": sorted(front(entries)),
        "tpot_seconds": tpot(entries),
        "entries": [asdict(e) for e in entries],
    }


def _page(entries: Sequence[Entry], title: str, about: Sequence[str], picture: bytes) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in COLUMNS)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in cells(entries)
    )
    notes = "".join(f"<p>{html.escape(line)}</p>" for line in about)
    image = base64.b64encode(picture).decode()
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
 body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem;
        color-scheme: light dark; }}
 table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }}
 th, td {{ padding: .25rem .6rem; text-align: right; border-bottom: 1px solid #8884; }}
 th:first-child, td:first-child {{ text-align: left; }}
 div {{ overflow-x: auto; }} img {{ max-width: 100%; background: white; }}
</style>
<h1>{html.escape(title)}</h1>{notes}
<div><table><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table></div>
<p>front (*): no other policy is at least as fast and at least as near to the exact run.</p>
<img alt="time per token against the NLL that is lost" src="data:image/png;base64,{image}">
</html>
"""


# ------------------------------------------------------------------------------- what is kept


def load_entry(path: Path) -> Entry | None:
    """A kept result; ``None`` where there is none, or one that cannot be read any more."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        speed, quality = told.pop("speed"), told.pop("quality")
        return Entry(
            **told,
            speed=None if speed is None else Speed(**{k: _tuple(v) for k, v in speed.items()}),
            quality=None if quality is None else Quality(**quality),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _file_name(policy: Policy) -> str:
    return "".join(c if c.isalnum() or c in "-+=." else "_" for c in policy.name)
