"""The command ``simulate``: a recorded trace under other policies, budgets and links.

Knows: how people write bandwidths and policies, how rows become a table, a file and a plot.
Does not know: what a run does (`understudy.simulate`) or how a trace lies on disk (`trace`).
"""

from __future__ import annotations

import json as json_format
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from understudy.cli import screen, session
from understudy.cli.options import EngineOptions, Json, option
from understudy.core import LayerEvent, UnderstudyError
from understudy.whole import keep, replacing

if TYPE_CHECKING:
    from understudy.simulate import Beside, Machine, Minds, Published, Row, Sizes

ACCOUNTINGS = ("event", "published")
FORMATS = ("bf16", "fp8", "4p5bpw")  # what a file of shapes knows the bytes of
LINK = "2GB/s"
MEASURED_TOKENS = 32
PICTURES = ("png", "svg", "pdf")


@dataclass(frozen=True, slots=True)
class Recording:
    """What a trace file says, and what it was forced to be."""

    name: str
    events: Sequence[LayerEvent]
    sizes: Sizes
    top_k: int


def simulate(
    trace: Annotated[Path, typer.Argument(metavar="TRACE", help="A routing trace.")],
    *,
    memory: Annotated[
        str,
        option(
            "--memory", metavar="A,B", help="Budgets for experts: 25% (of their bytes) or 8GiB."
        ),
    ] = "10%,25%,50%",
    policies: Annotated[
        str, option("--policies", metavar="A,B", help="As bench --policy; belady is always there.")
    ] = "lru,lrfu",
    link: Annotated[
        str | None,
        option("--link", metavar="A,B", help=f"Bytes per second; default: {LINK}, or as measured."),
    ] = None,
    compute: Annotated[
        str, option("--compute", metavar="RATE", help="At which expert bytes are computed.")
    ] = "20GB/s",
    host: Annotated[
        str | None,
        option("--host", metavar="RATE", help="At which a processor computes misses in place."),
    ] = None,
    frame: Annotated[
        float, option("--frame", metavar="MS", min=0, help="All but experts, per token.")
    ] = 0.0,
    latency: Annotated[
        float, option("--latency", metavar="MS", min=0, help="Before the first byte of a load.")
    ] = 0.0,
    per_token: Annotated[
        float,
        option("--per-token", metavar="US", min=0, help="Per further token of the same expert."),
    ] = 0.0,
    depth: Annotated[
        int, option("--depth", metavar="N", min=1, max=8, help="Layers to predict ahead.")
    ] = 1,
    profile: Annotated[
        Path | None, option("--profile", metavar="FILE", help="For routes that need one: buddy.")
    ] = None,
    measure: Annotated[
        str | None, option("--measure", metavar="MODEL", help="Measure all costs on this model.")
    ] = None,
    shape: Annotated[
        str | None,
        option("--shape", metavar="NAME[:FORMAT]", help="Force the bytes of another model."),
    ] = None,
    shapes: Annotated[
        Path | None, option("--shapes", metavar="FILE", help="Where --shape looks its name up.")
    ] = None,
    accounting: Annotated[
        str, option("--accounting", metavar="NAME", help="event (the engine's) or published.")
    ] = "event",
    against: Annotated[
        Path | None,
        option("--against", metavar="CSV", help="A published curve, beside both accountings."),
    ] = None,
    output: Annotated[Path | None, option("--output", "-o", metavar="FILE", help="JSON.")] = None,
    plot: Annotated[Path | None, option("--plot", metavar="PNG", help="Curves.")] = None,
    json: Json = False,
) -> None:
    """Replay a trace under other policies, budgets and links, on a virtual clock.

    The policies are the engine's own. Rows: one per budget, link and policy, with the clairvoyant's
    beside them; floors are what nothing on such a machine can beat.
    """
    if accounting not in ACCOUNTINGS:
        raise UnderstudyError(f"no accounting {accounting!r}; it is {' or '.join(ACCOUNTINGS)}")
    for path in (output, plot):
        if path is not None and not path.parent.is_dir():
            raise UnderstudyError(f"cannot write {path}: there is no folder {path.parent}")
    if plot is not None and plot.suffix.lstrip(".") not in PICTURES:
        raise UnderstudyError(f"cannot draw {plot}; name a file that ends in {', '.join(PICTURES)}")
    with screen.waiting(f"reading {trace}"):
        recording = recorded(trace, shape, shapes)
    named = parse_policies(policies, depth, profile, recording)
    if against is not None:
        answer = compared(recording, against, json)
    elif accounting == "published":
        answer = counted_as_published(recording, memory, named, json)
    else:
        declared = (latency / 1000, frame / 1000, per_token / 1e6)
        machines = parse_machines(link or LINK, compute, declared, recording.sizes.layers)
        if measure is not None:
            found = measured(measure)
            machines = [replace(found, link=m.link) for m in machines] if link else [found]
        if host is not None:
            machines = [replace(m, host=parse_rate(host, "--host")) for m in machines]
        answer = swept(recording, memory, named, machines, plot, json)
    if output is not None:
        keep(output, json_format.dumps(answer) + "\n")
    if json:
        screen.write_json(answer)


# ------------------------------------------------------------------------------- what was asked for


def parse_policies(
    text: str, depth: int, profile: Path | None, recording: Recording
) -> dict[str, tuple[Minds, int | None]]:
    """``lru,lrfu+next-gate`` -> name -> minds and the most slots."""
    from understudy.bench import Policy
    from understudy.profile import Profile
    from understudy.simulate import Minds

    learned = None if profile is None else Profile.load(profile)
    found: dict[str, tuple[Minds, int | None]] = {}
    for name in dict.fromkeys(part.strip() for part in text.split(",")):
        if name == "belady":
            continue  # always there
        p = Policy.parse(name)
        minds = Minds(p.evictor, p.predictor, p.route, p.resolver, depth, p.self_switch, learned)
        found[p.name] = minds, _slots(p.slots, recording)
    return found


def _slots(told: int | str | None, recording: Recording) -> int | None:
    """``2k``: for two layers' choices. ``50%``: of all experts."""
    if not isinstance(told, str):
        return told
    whole = {"k": recording.top_k, "%": recording.sizes.count / 100}[told[-1]]
    return int(float(told[:-1]) * whole)


def parse_rate(text: str, name: str) -> float:
    """``2GB/s`` or ``2GB`` -> bytes per second."""
    from understudy.plan import parse_memory

    written = text.strip()
    try:
        if "%" in written or written.lower() == "auto":
            raise UnderstudyError("a share of nothing")
        return float(parse_memory(written.removesuffix("/s"), 0))
    except UnderstudyError:
        raise UnderstudyError(f"cannot read {name} {text!r}; write 2GB/s or 500MiB/s") from None


def parse_machines(
    link: str, compute: str, declared: tuple[float, float, float], layers: int
) -> list[Machine]:
    """One machine per link. ``declared``: latency, frame per token, seconds per further token."""
    from understudy.simulate import Machine

    latency, frame, per_token = declared
    rate = parse_rate(compute, "--compute")
    return [
        Machine(
            parse_rate(part, "--link"), rate,
            latency=latency, per_token=per_token, frame=frame / layers,
        )
        for part in link.split(",")
    ]  # fmt: skip


def parse_budgets(text: str, sizes: Sizes) -> list[int]:
    from understudy.plan import parse_memory

    if "auto" in text.lower():
        raise UnderstudyError("--memory auto is no budget to simulate; write 10%,50% or 8GiB")
    return [parse_memory(part, sizes.total) for part in text.split(",")]


def recorded(trace: Path, shape: str | None, shapes: Path | None) -> Recording:
    """The events of ``trace`` and the sizes of its experts, or those of ``shape``."""
    from understudy.simulate import Sizes
    from understudy.trace import import_csv, read

    found = import_csv(trace) if trace.suffix == ".csv" else read(trace)
    sizes = Sizes(tuple(found.shape.experts), tuple(found.shape.expert_bytes))
    if shape is None:
        return Recording(found.shape.model, found.events, sizes, found.shape.top_k)
    return Recording(shape, found.events, forced(shape, shapes, sizes), found.shape.top_k)


def forced(wanted: str, shapes: Path | None, recorded: Sizes) -> Sizes:
    """The sizes of another model over recorded routing."""
    if shapes is None:
        raise UnderstudyError("--shape needs the file that knows it; name it with --shapes FILE")
    name, _, written = wanted.partition(":")
    known = read_shapes(shapes)
    form = written or FORMATS[0]
    if form not in FORMATS:
        raise UnderstudyError(f"no bytes are known for {form!r}; it is {', '.join(FORMATS)}")
    found = known.get(name)
    layers, experts = recorded.layers, max(recorded.experts)
    fitting = [
        other
        for other, m in known.items()
        if (m["n_moe_layers"], m["n_experts"]) == (layers, experts)
    ]
    cure = f"these fit: {', '.join(fitting)}" if fitting else f"no shape in {shapes} fits"
    if found is None:
        raise UnderstudyError(f"{shapes} has no shape {name!r}; {cure}")
    if name not in fitting:
        raise UnderstudyError(
            f"{name} has {found['n_moe_layers']} layers of {found['n_experts']} experts and this "
            f"trace {layers} of {experts}; {cure}"
        )
    nbytes = int(found["derived"][f"bytes_per_expert_{form}"])
    from understudy.simulate import Sizes

    return Sizes(recorded.experts, (nbytes,) * layers)


def read_shapes(path: Path) -> dict[str, Any]:
    try:
        models = json_format.loads(path.read_text(encoding="utf-8"))["models"]
        return {model["name"]: model for model in models}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnderstudyError(
            f"{path} is no file of shapes ({error}); it is JSON with a list 'models'"
        ) from None


def measured(model: str) -> Machine:
    """A machine like this one, as it runs ``model``: the link as ``doctor`` reads it, the rest from
    the seconds of a short generation."""
    from understudy.bench import Rates, prompts
    from understudy.simulate import Machine

    with session.opened(model, EngineOptions(predictor="none")) as engine:
        rates = Rates(engine)
        rates.measure()
        warm, text = prompts(engine, 2, MEASURED_TOKENS)
        engine.generate(warm, max_new_tokens=MEASURED_TOKENS, ignore_eos=True)
        done = engine.generate(text, max_new_tokens=MEASURED_TOKENS + 1, ignore_eos=True)
        steps, spent = len(done.tokens) - 1, done.decode_counters
        layers = spent.events / steps
        busy = (spent.expert_seconds + spent.stall_seconds) / steps
        if not rates.disk or not spent.expert_seconds:
            raise UnderstudyError(f"{model} cannot be measured here; declare --link and --compute")
        machine = Machine(
            link=rates.disk,
            compute=spent.lookups * engine.plan.expert_bytes / spent.expert_seconds,
            frame=max(0.0, done.tpot - busy) / layers,
        )
    screen.say(f"measured on {model}: {in_words(machine)}")
    return machine


def in_words(machine: Machine) -> str:
    return (
        f"link {machine.link / 1e9:.3g} GB/s, compute {machine.compute / 1e9:.3g} GB/s, "
        f"frame {1000 * machine.frame:.3g} ms a layer, latency {1000 * machine.latency:.3g} ms"
    )


# --------------------------------------------------------------------------------- what is answered


def swept(
    recording: Recording,
    memory: str,
    policies: Mapping[str, tuple[Minds, int | None]],
    machines: Sequence[Machine],
    plot: Path | None,
    json: bool,
) -> dict[str, Any]:
    """Runs, their table and their plot."""
    from understudy.simulate import sweep

    budgets = parse_budgets(memory, recording.sizes)
    with screen.progress() as bar:
        rows = sweep(
            recording.events, sizes=recording.sizes, budgets=budgets, machines=machines,
            policies=policies, report=bar("simulating"),
        )  # fmt: skip
    screen.show(table_of(rows, recording), json_too=json)
    if plot is not None:
        with replacing(plot) as temporary:
            draw(rows, recording, temporary, plot.suffix)
    return {
        **described(recording),
        "accounting": "event",
        "machines": [asdict(machine) for machine in machines],
        "rows": [row.as_dict() for row in rows],
    }


def described(recording: Recording) -> dict[str, Any]:
    sizes = recording.sizes
    return {
        "model": recording.name,
        "events": len(recording.events),
        "layers": sizes.layers,
        "experts": sizes.count,
        "expert_bytes": sizes.total,
        "slot_bytes": sizes.largest,
    }


def table_of(rows: Sequence[Row], recording: Recording) -> Table:
    from understudy.plan import shown_size

    total = recording.sizes.total
    table = screen.grid(
        "memory", "link", "policy", "hits", "decode", "read", "TPOT", "stall", "own", "belady",
        "x floor",
        title=f"{recording.name}: {shown_size(total)} of experts; read, ms and floors per token",
    )  # fmt: skip
    for row in rows:
        o = row.outcome
        table.add_row(
            f"{shown_size(row.budget)} ({100 * row.budget / total:.0f} %)",
            f"{row.machine.link / 1e9:.3g} GB/s",
            row.policy,
            f"{100 * o.hit_rate:.1f} %",
            f"{100 * o.hit_rate_decode:.1f} %",
            shown_size(o.bytes_per_token),
            *(_ms(x) for x in (o.tpot, o.stall_per_step, row.floor_own, row.floor_belady)),
            f"{row.times_floor:.2f}",
        )
    return table


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:.0f}"


def draw(rows: Sequence[Row], recording: Recording, path: Path, suffix: str) -> None:
    """Hit rate and TPOT against budget: a line per policy, the oracle dashed, a panel per link."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    machines = list(dict.fromkeys(row.machine for row in rows))
    figure, panels = pyplot.subplots(
        1, 1 + len(machines), figsize=(5 * (1 + len(machines)), 4), layout="constrained"
    )
    _curves(panels[0], [r for r in rows if r.machine == machines[0]], "hit rate, decode, %")
    for panel, machine in zip(panels[1:], machines, strict=True):
        chosen = [row for row in rows if row.machine == machine]
        _curves(panel, chosen, f"ms per token, link {machine.link / 1e9:.3g} GB/s")
        panel.set_ylim(bottom=0)
    panels[0].legend()
    figure.suptitle(f"{recording.name}, simulated")
    figure.savefig(path, format=suffix.lstrip("."), dpi=150)
    pyplot.close(figure)


def _curves(panel: Any, rows: Sequence[Row], label: str) -> None:
    for policy in dict.fromkeys(row.policy for row in rows):
        points = sorted(
            (row.budget / 2**30, 100 * row.outcome.hit_rate_decode, 1000 * row.outcome.tpot)
            for row in rows
            if row.policy == policy
        )
        x, hits, tpot = zip(*points, strict=True)
        style = {"color": "black", "linestyle": "--"} if policy == "belady" else {"marker": "o"}
        panel.plot(x, hits if label.startswith("hit") else tpot, label=policy, **style)
    panel.set_xlabel("memory for experts, GiB")
    panel.set_ylabel(label)
    panel.grid(alpha=0.3)


def counted_as_published(
    recording: Recording,
    memory: str,
    policies: Mapping[str, tuple[Minds, int | None]],
    json: bool,
) -> dict[str, Any]:
    """Hit rates by the other accounting, which has no clock and knows evictors only."""
    from understudy.plan import shown_size
    from understudy.simulate import published

    evictors = [name for name, (minds, _) in policies.items() if name == minds.evictor]
    for name in policies:
        if name not in evictors:
            raise UnderstudyError(
                f"the published accounting knows evictors only, not {name!r}; "
                "leave it out or use --accounting event"
            )
    table = screen.grid("memory", "policy", "hits", "decode", "read", title=recording.name)
    rows = []
    budgets = parse_budgets(memory, recording.sizes)
    with screen.progress() as bar:
        report = bar("counting")
        cells = [(budget, name) for budget in budgets for name in (*evictors, "belady")]
        for done, (budget, name) in enumerate(cells, start=1):
            found = published(recording.events, sizes=recording.sizes, budget=budget, evictor=name)
            hits, decode = 100 * found.hit_rate, 100 * found.hit_rate_decode
            read = shown_size(found.bytes_read)
            table.add_row(shown_size(budget), name, f"{hits:.1f} %", f"{decode:.1f} %", read)
            rows.append({"memory_bytes": budget, "policy": name, **asdict(found)})
            report(done, len(cells))
    screen.show(table, json_too=json)
    return {**described(recording), "accounting": "published", "rows": rows}


def compared(recording: Recording, against: Path, json: bool) -> dict[str, Any]:
    """A published curve beside ours, by both accountings."""
    from understudy.plan import shown_size
    from understudy.simulate import beside

    lines = read_curve(against)
    with screen.progress() as bar:
        found = beside(recording.events, lines, sizes=recording.sizes, report=bar("comparing"))
    table = screen.grid(
        "memory", "policy", "published", "ours, their way", "ours, event-atomic", "slots",
        title=f"{recording.name}: hits of all lookups / of decode, %",
    )  # fmt: skip
    for row in found:
        table.add_row(
            shown_size(row.line.budget),
            row.line.policy,
            f"{row.line.hits:.2f} / {row.line.hits_decode:.2f}",
            f"{row.hits:.2f} / {row.hits_decode:.2f}",
            f"{row.engine_hits:.2f} / {row.engine_hits_decode:.2f}",
            str(row.slots),
        )
    screen.show(table, json_too=json)
    left_out = sorted({line.policy for line in lines} - {row.line.policy for row in found})
    if left_out:
        screen.say(f"note: not compared, no such policy here: {', '.join(left_out)}")
    furthest = max(map(_distance, found))
    (screen.say if json else screen.tell)(
        f"their way, the furthest point is {furthest:.3f} percentage points off"
    )
    return {
        **described(recording),
        "accounting": "both",
        "furthest_pct_points": round(furthest, 3),
        "rows": [row.as_dict() for row in found],
    }


def _distance(row: Beside) -> float:
    return max(abs(row.hits - row.line.hits), abs(row.hits_decode - row.line.hits_decode))


def read_curve(path: Path) -> list[Published]:
    """budget_mib, policy, hit_pct_cum, hit_pct_decode; further columns are not read."""
    import csv

    from understudy.simulate import Published

    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [
                Published(
                    int(float(row["budget_mib"]) * 2**20),
                    row["policy"],
                    float(row["hit_pct_cum"]),
                    float(row["hit_pct_decode"]),
                )
                for row in csv.DictReader(file)
            ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnderstudyError(
            f"{path} is no curve ({error}); it is a CSV with the columns budget_mib, policy, "
            "hit_pct_cum and hit_pct_decode"
        ) from None
