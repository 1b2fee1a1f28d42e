"""The command ``profile``: reads text through a model and writes down what it learned about it.

Knows: what a person is told, and the tables of a profile. Does not know: how it is measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from understudy.cli import screen, session
from understudy.cli.options import Json, option
from understudy.core import UnderstudyError

if TYPE_CHECKING:
    from understudy.learn import Source

Facts = Mapping[str, Any]

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="A checkpoint folder or a Hugging Face id."),
]
Data = Annotated[
    list[Path] | None,
    option(
        "--data",
        help="Text, .xz, or .jsonl with text or question; repeatable; default: Python's manual.",
        metavar="FILE",
    ),
]
Out = Annotated[
    Path | None,
    option("--out", "-o", help="Default: NAME.profile.safetensors here.", metavar="FILE"),
]
Tokens = Annotated[
    int, option("--tokens", help="Read in all; a fifth is held out.", metavar="N", min=1)
]
Window = Annotated[int, option("--window", help="Tokens per forward.", metavar="N", min=2)]
Smoothing = Annotated[
    float,
    option("--smoothing", help="Mean outputs of the layer mixed in.", metavar="X", min=0.0),
]
Seed = Annotated[int, option("--seed", help="Of all that is drawn.", metavar="N")]
Trained = Annotated[bool, option("--estimator", help="Train the small network too.")]
TrainTokens = Annotated[
    int, option("--estimator-tokens", help="It learns from, at most.", metavar="N", min=1)
]
Epochs = Annotated[
    int, option("--estimator-epochs", help="Times it sees them.", metavar="N", min=1)
]
Width = Annotated[
    int | None,
    option("--estimator-width", help="Default: half of the model's.", metavar="N", min=1),
]
Expansion = Annotated[
    int, option("--estimator-expansion", help="Of its hidden layer.", metavar="N", min=1)
]
Memory = Annotated[
    str, option("--memory", help="Of the model and what is learned: 8GiB, auto.", metavar="SIZE")
]
Threads = Annotated[int | None, option("--threads", help="Computing threads.", metavar="N", min=1)]
Show = Annotated[
    Path | None,
    option("--show", help="Print what is in a profile; needs no MODEL.", metavar="FILE"),
]


def profile(
    model: Model = None,
    *,
    data: Data = None,
    out: Out = None,
    tokens: Tokens = 65_536,
    window: Window = 256,
    smoothing: Smoothing = 16.0,
    seed: Seed = 0,
    estimator: Trained = False,
    estimator_tokens: TrainTokens = 100_000,
    estimator_epochs: Epochs = 4,
    estimator_width: Width = None,
    estimator_expansion: Expansion = 4,
    memory: Memory = "auto",
    threads: Threads = None,
    show: Show = None,
    json: Json = False,
) -> None:
    """Learn about a model offline: mean outputs, who is chosen with whom, an estimator."""
    if show is not None:
        from understudy.profile import Profile

        _tell(Profile.load(show).provenance, show, json)
        return
    if model is None:
        raise UnderstudyError("say which MODEL to learn about, or --show FILE")
    target = _target(model, out)
    with screen.waiting("loading"):
        session.quiet_guests()
        from understudy.learn import Settings, Training, learn

    texts = _texts(data)
    how = Training(estimator_tokens, estimator_epochs, estimator_width, estimator_expansion)
    settings = Settings(tokens, window, smoothing, seed=seed, estimator=how if estimator else None)
    with screen.progress() as bar:
        made = learn(
            model, texts, settings, memory=memory, threads=threads, say=screen.say, bar=bar
        )
    made.save(target)
    _tell(made.provenance, target, json)


def _target(model: str, out: Path | None) -> Path:
    """Complains before the work, not after it."""
    target = out or Path.cwd() / f"{Path(model).expanduser().resolve().name}.profile.safetensors"
    if not target.parent.is_dir() or target.is_dir():
        raise UnderstudyError(f"{target} cannot be written: name a file in a folder that exists")
    return target


def _texts(data: Sequence[Path] | None) -> list[Source]:
    from understudy.learn import Source, read
    from understudy.texts import python_docs

    if data:
        return [read(path) for path in data]
    screen.say("no --data: learning from Python's own manual; give text like what will be asked")
    text = python_docs()
    return [Source.of("Python's manual (pydoc_data.topics)", text.encode(), text)]


# ---------------------------------------------------------------------------------- what is shown


def _tell(facts: Facts, file: Path, json: bool) -> None:
    screen.show(screen.facts(summary(facts, file), title=str(facts["model"])), json_too=json)
    screen.show(recall_table(facts), json_too=json)
    screen.show(layer_table(facts), json_too=json)
    if json:
        screen.write_json({"profile": file.name, **facts})


def summary(facts: Facts, file: Path) -> dict[str, str]:
    tokens, trained = facts["tokens"], facts["estimator"]
    rows = {
        "profile": str(file),
        "data": ", ".join(source["name"] for source in facts["data"]),
        "tokens": f"{tokens['read']}: {tokens['learned']} to learn from, {tokens['chosen']} to "
        f"choose by, {tokens['reported']} reported",
        "smoothing": f"{facts['smoothing']:g}",
        "seconds": f"{facts['seconds']:.0f}",
    }
    if trained is not None:
        better = [str(layer) for layer, is_so in enumerate(facts["estimator_better"]) if is_so]
        rows["estimator"] = (
            f"{trained['parameters']} parameters, width {trained['width']}, {trained['pairs']} "
            f"pairs x {trained['epochs']} epochs in {trained['seconds']:.0f} s; KL "
            f"{trained['loss'][0][1]:.3f} -> {trained['loss'][-1][1]:.3f} nats; better than the "
            f"router on `quasi` in layers: {', '.join(better) or 'none'}"
        )
    return rows


def recall_table(facts: Facts) -> Table:
    """Recall per layer and foresight; a second table would not fit beside it."""
    names = list(facts["recall"])
    table = screen.grid(
        "layer", *names,
        title="% of a layer's chosen experts guessed from the layer before (by weight)",
    )  # fmt: skip
    for layer in range(facts["layers"]):
        both = [(facts["recall"][n][layer], facts["weighted_recall"][n][layer]) for n in names]
        table.add_row(str(layer), *(_shares(*pair) for pair in both))
    means = [(mean(facts["recall"][n]), mean(facts["weighted_recall"][n])) for n in names]
    table.add_row("1-", *(_shares(*pair) for pair in means))
    return table


def mean(row: Sequence[float | None]) -> float | None:
    """Of the layers after the first, which nobody looks ahead to."""
    known = [x for x in row[1:] if x is not None]
    return sum(known) / len(known) if known else None


def _shares(count: float | None, weight: float | None) -> str:
    if count is None or weight is None:
        return "-"
    return f"{100 * count:.1f} ({100 * weight:.1f})"


def layer_table(facts: Facts) -> Table:
    rare = f"under {facts['smoothing']:g}"
    table = screen.grid(
        "layer", *(f"cos {name}" for name in facts["cosine"]), "nats", rare, "never",
        title="cosine of what a router is asked and its true input; nats of KL per token without "
        "the layer's last rank; experts rarely chosen",
    )  # fmt: skip
    for layer in range(facts["layers"]):
        cosines = [row[layer] for row in facts["cosine"].values()]
        table.add_row(
            str(layer),
            *("-" if x is None else f"{x:.3f}" for x in cosines),
            f"{facts['sensitivity'][layer]:.5f}",
            str(facts["rarely_chosen"][layer]),
            str(facts["never_chosen"][layer]),
        )
    return table
