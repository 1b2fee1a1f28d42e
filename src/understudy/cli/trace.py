"""The command that records, imports and summarises routing: ``trace``.

Knows: which of the three was asked for, how a summary becomes a table and a plot. Does not know:
the file's columns (`trace`), what the figures mean (`summary`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from understudy.cli import screen, session
from understudy.cli.evaluate import Data
from understudy.cli.options import EngineOptions, Json, option, takes_engine_options
from understudy.core import UnderstudyError

if TYPE_CHECKING:
    from understudy.core import LayerEvent
    from understudy.engine import Engine
    from understudy.summary import LayerSummary
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
    json: Json = False,
    options: EngineOptions,
) -> None:
    """Record which experts a model's routers choose, on real text.

    Look-ahead is kept with it where --predictor looks ahead (next-gate does).
    """
    if summary is not None:
        return show_summary(summary, plot, json)
    if output is None:
        raise UnderstudyError("name the trace to write with -o, or one to read with --summary")
    if imported is not None:
        return import_routes(imported, output, json)
    if model is None:
        raise UnderstudyError("name a MODEL to record, --import a CSV, or --summary a trace")
    record(model, data, output, sequences, prompt, tokens, scores, json, options)
    return None


def record(
    model: str, data: Sequence[Path] | None, output: Path, sequences: int, prompt: int,
    tokens: int, scores: bool, json: bool, options: EngineOptions,
) -> None:  # fmt: skip
    from understudy import texts, trace
    from understudy.engine import Engine

    domains = texts.domains(list(data or ()))
    with screen.progress() as bar:
        session.quiet_guests()
        with Engine(model, **{**options.as_arguments(), "self_switch": False}) as engine:
            engine.model.understudy.runtime.wants_scores |= scores
            pieces = list(cut(engine, domains, sequences, prompt + tokens))
            report = bar(f"recording {len(pieces)} texts")
            events = recorded(engine, pieces, prompt, report)
            rows = trace.write(output, shape_of(engine, options), events)
    told = {"trace": str(output), "sequences": len(pieces), "rows": rows}
    screen.say(f"{output}: {len(pieces)} texts of {prompt} + {tokens} tokens, {rows} rows")
    if json:
        screen.write_json(told)


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
    engine: Engine, pieces: Sequence[list[int]], prompt: int, report: Any
) -> Iterator[list[LayerEvent]]:
    """The events of each piece: its prompt, then its own tokens as if they were the answer."""
    for done, ids in enumerate(pieces, 1):
        engine.start_recording()
        answer = ids[prompt:]
        engine.generate(ids[:prompt], max_new_tokens=len(answer), dictated=answer, ignore_eos=True)
        yield engine.stop_recording()
        report(done, len(pieces))


def shape_of(engine: Engine, options: EngineOptions) -> Shape:
    from understudy import model as guest
    from understudy.trace import Shape

    anatomy = engine.model.understudy.anatomy
    sizes = {expert.layer: layout.nbytes for expert, layout in anatomy.layouts.items()}
    return Shape(
        model=anatomy.name,
        experts=tuple(m.num_experts for m in anatomy.modules),
        top_k=guest.experts_per_token(anatomy.checkpoint.config),
        expert_bytes=tuple(sizes[layer] for layer in range(len(anatomy.modules))),
        format=anatomy.checkpoint.format,
        source=f"recorded with predictor {options.predictor}, route {options.route}",
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
    from understudy.summary import overall, summarise
    from understudy.trace import read

    found = read(path)
    layers = summarise(found)
    if not layers:
        raise UnderstudyError(f"{path}: holds no events; record it again")
    screen.show(table(found, layers), json_too=json)
    if plot is not None:
        plot.write_bytes(draw(found, layers))
        screen.say(f"plot: {plot}")
    if json:
        shape, means = asdict(found.shape), overall(layers)
        told = {"shape": shape, "overall": means, "layers": [asdict(one) for one in layers]}
        screen.write_json(told)


def table(trace: Trace, layers: Sequence[LayerSummary]) -> Table:
    from understudy.summary import overall

    grid = screen.grid(
        "layer", "tokens", "used", "overlap", "chance", "entropy", "of ln E", "gap", "p90",
        "stack", "p90", "partners", "chance",
        title=f"{trace.shape.model}: {trace.shape.layers} layers, top {trace.shape.top_k} of "
        f"{max(trace.shape.experts)}; {len(set(trace.sequences))} texts",
    )  # fmt: skip
    for one in layers:
        grid.add_row(
            str(one.layer), str(one.tokens), _share(one.used), _share(one.overlap),
            _share(one.overlap_uniform), f"{one.entropy:.2f}", _share(one.entropy_share),
            *(f"{x:.0f}" for x in (*one.gap, *one.stack)), _share(one.partners),
            _share(one.partners_uniform),
        )  # fmt: skip
    means = overall(layers)
    grid.add_row(
        "all", "", _share(means["used"]), _share(means["overlap"]),
        _share(means["overlap_uniform"]), "", _share(means["entropy_share"]), "", "", "", "",
        _share(means["partners"]), _share(means["partners_uniform"]),
    )  # fmt: skip
    return grid


def _share(value: float) -> str:
    return f"{100 * value:.1f} %"


def draw(trace: Trace, layers: Sequence[LayerSummary]) -> bytes:
    """PNG: four small plots over the layers."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    xs = [one.layer for one in layers]
    panels: list[tuple[str, list[tuple[str, list[float]]]]] = [
        ("experts in common with the token before", [
            ("measured", [one.overlap for one in layers]),
            ("by chance", [one.overlap_uniform for one in layers]),
        ]),
        ("use of the experts", [
            ("share used at all", [one.used for one in layers]),
            ("entropy, share of ln E", [one.entropy_share for one in layers]),
        ]),
        ("tokens until an expert is used again", [
            ("median", [one.gap[0] for one in layers]),
            ("90th percentile", [one.gap[1] for one in layers]),
        ]),
        ("co-activation with the 4 most frequent partners", [
            ("measured", [one.partners for one in layers]),
            ("by chance", [one.partners_uniform for one in layers]),
        ]),
    ]  # fmt: skip
    for axes, (title, lines) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        for label, values in lines:
            axes.plot(xs, values, marker=".", label=label)
        axes.set(title=title, xlabel="MoE layer")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(trace.shape.model)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()
