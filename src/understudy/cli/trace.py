"""The command that records, imports and summarises routing: ``trace``.

Knows: which of the three was asked for, what a recording engine has to be told, how a summary
becomes a table and a plot. Does not know: the file's columns (`trace`), what the figures mean
(`summary`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from understudy.cli import screen, session
from understudy.cli.evaluate import Data
from understudy.cli.options import EngineOptions, Json, option, takes_engine_options
from understudy.core import UnderstudyError
from understudy.whole import keep

if TYPE_CHECKING:
    from understudy.core import LayerEvent
    from understudy.engine import Engine
    from understudy.experts.runtime import Seen
    from understudy.summary import LayerSummary, Summary
    from understudy.trace import Shape, Trace


@takes_engine_options
def trace(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A checkpoint folder or a hub id.")
    ] = None,
    *,
    data: Data = None,
    output: Annotated[
        Path | None, option("--output", "-o", help="The trace to write.", metavar="FILE")
    ] = None,
    imported: Annotated[
        Path | None,
        option("--import", help="Make it of a public route CSV instead.", metavar="FILE"),
    ] = None,
    summary: Annotated[
        Path | None, option("--summary", help="Say what a trace holds.", metavar="FILE")
    ] = None,
    plot: Annotated[
        Path | None, option("--plot", help="With --summary: draw it too (PNG).", metavar="FILE")
    ] = None,
    sequences: Annotated[
        int, option("--sequences", help="Pieces of text of each file.", metavar="N", min=1)
    ] = 4,
    prompt: Annotated[
        int, option("--prompt-tokens", "-p", help="Read in one go.", metavar="N", min=1)
    ] = 128,
    tokens: Annotated[
        int, option("--tokens", help="Decoded one by one after it.", metavar="N", min=1)
    ] = 128,
    scores: Annotated[
        bool, option("--scores", help="Keep the probability of every expert.")
    ] = False,
    lookahead: Annotated[
        bool,
        option(
            "--lookahead/--no-lookahead",
            help="Keep what --predictor foresees of the next --depth layers.",
        ),
    ] = True,
    json: Json = False,
    options: EngineOptions,
) -> None:
    """Record which experts a model's routers choose, on real text; or import, or summarise."""
    require_one_job(model, imported, summary, output, plot)
    if summary is not None:
        show_summary(summary, plot, json)
    elif imported is not None:
        import_routes(imported, checked(output), json)
    elif model is not None:
        wanted = Wanted(sequences, prompt, tokens, scores, options.depth if lookahead else 0)
        record(model, data, checked(output), wanted, json, options)


def require_one_job(
    model: str | None, imported: Path | None, summary: Path | None, output: Path | None,
    plot: Path | None,
) -> None:  # fmt: skip
    """Complain about what is missing, and about what would be ignored."""
    jobs = {"MODEL": model, "--import": imported, "--summary": summary}
    asked = [name for name, value in jobs.items() if value is not None]
    if not asked:
        raise UnderstudyError("name a MODEL to record, --import a CSV, or --summary a trace")
    if len(asked) > 1:
        raise UnderstudyError(f"{' and '.join(asked)} are different jobs; ask for one of them")
    if summary is None and output is None:
        raise UnderstudyError("name the trace to write with -o")
    if summary is None and plot is not None:
        raise UnderstudyError("--plot draws what --summary reads; give it a trace")
    if summary is not None and output is not None:
        raise UnderstudyError("--summary writes no trace; --plot FILE.png keeps a picture")


def checked(output: Path | None) -> Path:
    """Where the trace goes: known to be possible before the model runs for an hour."""
    assert output is not None
    if output.is_dir() or not output.parent.is_dir():
        raise UnderstudyError(f"cannot write {output}: name a file in a folder that exists")
    return output


@dataclass(frozen=True, slots=True)
class Wanted:
    """Pieces of each file, tokens of each piece, and what is kept beside the choice. ``depth``: how
    many layers ahead; 0: look-ahead is not kept."""

    sequences: int
    prompt: int
    tokens: int
    scores: bool
    depth: int


def record(
    model: str, data: Sequence[Path] | None, output: Path, wanted: Wanted, json: bool,
    options: EngineOptions,
) -> None:  # fmt: skip
    from understudy import texts, trace
    from understudy.engine import Engine

    domains = texts.domains(list(data or ()))
    with screen.progress() as bar:
        session.quiet_guests()
        with Engine(model, **{**options.as_arguments(), "self_switch": False}) as engine:
            length = wanted.prompt + wanted.tokens
            pieces = list(cut(engine, domains, wanted.sequences, length))
            report = bar(f"recording {len(pieces)} texts")
            events = recorded(engine, pieces, wanted, report)
            rows = trace.write(output, shape_of(engine, options), events)
            unseen = dict(engine.model.understudy.runtime.lookahead.unavailable)
    if wanted.depth and unseen:
        layer, reason = next(iter(unseen.items()))
        screen.say(f"note: {len(unseen)} layers cannot be foreseen (layer {layer}: {reason})")
    screen.say(
        f"{output}: {len(pieces)} texts of {wanted.prompt} + {wanted.tokens} tokens, {rows} rows"
    )
    if json:
        screen.write_json({"trace": str(output), "sequences": len(pieces), "rows": rows})


def cut(
    engine: Engine, domains: dict[str, str], sequences: int, length: int
) -> Iterator[list[int]]:
    """Pieces of ``length`` tokens, spread evenly over each text."""
    for name, text in domains.items():
        for number in range(sequences):
            start = len(text) * number // sequences
            ids = engine.encode(text[start : start + 10 * length])[:length]
            if len(ids) < length:
                raise UnderstudyError(
                    f"{name}: too short for {sequences} pieces of {length} tokens; ask for fewer "
                    "--sequences or --tokens, or name a longer file"
                )
            yield ids


def recorded(
    engine: Engine, pieces: Sequence[list[int]], wanted: Wanted, report: Any
) -> Iterator[list[LayerEvent]]:
    """The events of each piece: its prompt, then its own tokens as if they were the answer."""
    runtime = engine.model.understudy.runtime
    runtime.wants_scores |= wanted.scores
    if wanted.depth:
        runtime.watch = foreseer(runtime, wanted.depth)
    for done, ids in enumerate(pieces, 1):
        engine.start_recording()
        answer = ids[wanted.prompt :]
        engine.generate(
            ids[: wanted.prompt], max_new_tokens=len(answer), dictated=answer, ignore_eos=True
        )
        events = engine.stop_recording()
        for event in events:
            if wanted.scores and event.scores is None:
                raise UnderstudyError(
                    f"MoE layer {event.layer} has no router that can be asked for its scores; "
                    "record without --scores"
                )
            if not wanted.depth:
                event.lookahead = {}
        yield events
        report(done, len(pieces))


def foreseer(runtime: Any, depth: int) -> Callable[[Seen], None]:
    """Asks for the look-ahead that the engine did not ask for itself: it has no use for it where
    all experts are in memory, or where its predictor looks elsewhere."""

    def watch(seen: Seen) -> None:
        event, forward = runtime.recording[-1], seen.forward
        if len(event.lookahead) < depth and forward is not None:
            event.lookahead = runtime.lookahead.ask(forward, seen.event, depth, forward.rows)

    return watch


def shape_of(engine: Engine, options: EngineOptions) -> Shape:
    from understudy import model as guest
    from understudy.trace import Shape

    anatomy = engine.model.understudy.anatomy
    config = guest.text_config(anatomy.checkpoint.config)
    sizes = {expert.layer: layout.nbytes for expert, layout in anatomy.layouts.items()}
    return Shape(
        model=anatomy.name,
        experts=tuple(m.num_experts for m in anatomy.modules),
        top_k=guest.experts_per_token(anatomy.checkpoint.config),
        expert_bytes=tuple(sizes[layer] for layer in range(len(anatomy.modules))),
        format=anatomy.checkpoint.format,
        source=f"recorded with predictor {options.predictor}, route {options.route}",
        hidden=getattr(config, "hidden_size", None),
        date=date.today().isoformat(),
    )


def import_routes(source: Path, output: Path, json: bool) -> None:
    from understudy import trace

    found = trace.import_csv(source)
    rows = trace.write(output, found.shape, found.by_sequence())
    screen.say(f"{output}: {found.shape.model}, {len(found.events)} events, {rows} rows")
    if json:
        screen.write_json({"trace": str(output), "events": len(found.events), "rows": rows})


# -------------------------------------------------------------------------------------- summaries


def show_summary(path: Path, plot: Path | None, json: bool) -> None:
    from understudy.summary import summarise
    from understudy.trace import read

    with screen.waiting(f"reading {path}"):
        found = read(path)
        if not found.events:
            raise UnderstudyError(f"{path}: holds no events; record it again")
        summary = summarise(found)
    screen.show(table(found, summary), json_too=json)
    if plot is not None:
        keep(plot, draw(found, summary.layers))
        screen.say(f"plot: {plot}")
    if json:
        layers = [told(one) for one in summary.layers]
        shape, overall = asdict(found.shape), told(summary.overall)
        screen.write_json({"shape": shape, "overall": overall, "layers": layers})


def told(one: LayerSummary) -> dict[str, Any]:
    """For JSON, which knows no nan."""

    def known(value: Any) -> Any:
        if isinstance(value, tuple):
            return [known(part) for part in value]
        return None if isinstance(value, float) and isnan(value) else value

    return {name: known(value) for name, value in asdict(one).items()}


def table(trace: Trace, summary: Summary) -> Table:
    texts = len(set(trace.sequences))
    grid = screen.grid(
        "layer", "tokens", "used", "overlap", "any two", "chance", "entropy", "of ln E",
        "gap", "p90", "stack", "p90", "partners", "popular", "chance",
        title=f"{trace.shape.model}: {trace.shape.layers} layers, top {trace.shape.top_k} of "
        f"{max(trace.shape.experts)}; {texts} text{'s' * (texts != 1)}",
    )  # fmt: skip
    for one in (*summary.layers, summary.overall):
        grid.add_row(
            "all" if one.layer is None else str(one.layer),
            str(one.tokens),
            *map(_share, (one.used, one.overlap, one.overlap_any, one.overlap_uniform)),
            f"{one.entropy:.2f}",
            _share(one.entropy_share),
            *("-" if isnan(x) else f"{x:.0f}" for x in (*one.gap, *one.stack)),
            *map(_share, (one.partners, one.partners_popular, one.partners_uniform)),
        )
    return grid


def _share(value: float) -> str:
    return "-" if isnan(value) else f"{100 * value:.1f} %"


def draw(trace: Trace, layers: Sequence[LayerSummary]) -> bytes:
    """PNG: four small plots over the layers."""
    import io

    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shares = (
        ("experts in common with the token before", "share of a token's experts",
         {"measured": "overlap", "any two tokens": "overlap_any", "uniform": "overlap_uniform"}),
        ("use of the experts", "share",
         {"used at all": "used", "entropy, of ln E": "entropy_share"}),
        (f"co-activation with the {_top()} closest partners", "share of all co-activation",
         {"measured": "partners", "by popularity alone": "partners_popular",
          "uniform": "partners_uniform"}),
    )  # fmt: skip
    xs = [one.layer for one in layers]
    with style.context("default"):  # light, whatever the user's own style is
        figure = Figure(figsize=(9, 6), layout="constrained")
        FigureCanvasAgg(figure)
        *panels, last = figure.subplots(2, 2).flat
        for axes, (title, unit, lines) in zip(panels, shares, strict=True):
            for label, name in lines.items():
                axes.plot(xs, [getattr(one, name) for one in layers], marker=".", label=label)
            axes.set(title=title, ylabel=unit, ylim=(0, 1))
        for number, label in enumerate(("median", "90th percentile")):
            last.plot(xs, [one.stack[number] for one in layers], marker=".", label=label)
        last.set(title="LRU stack distance", ylabel="experts of the layer")
        last.set_ylim(bottom=0)
        for axes in (*panels, last):
            axes.set_xlabel("MoE layer")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)
        figure.suptitle(trace.shape.model)
        out = io.BytesIO()
        figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def _top() -> int:
    from understudy.summary import TOP

    return TOP
