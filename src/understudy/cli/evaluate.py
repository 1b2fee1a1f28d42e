"""The command that judges answers: ``eval``.

Knows: how verdicts become a table. Does not know: how they are reached (`quality`).
"""

from __future__ import annotations

import json as json_text
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from understudy.cli import screen, session
from understudy.cli.options import EngineOptions, Json, Model, option, takes_engine_options
from understudy.core import UnderstudyError

if TYPE_CHECKING:
    from understudy.bench import Policy
    from understudy.quality import Session, Verdict

NOT_EXACT = 1  # exit code: everything ran, and a policy that says it is exact was not

Data = Annotated[
    list[Path] | None,
    typer.Option(
        "--data", help="Text to use: .txt, .txt.xz or .jsonl; repeatable.", metavar="FILE"
    ),
]
Output = Annotated[
    Path | None, option("--output", "-o", help="Write the result here too.", metavar="FILE")
]


@takes_engine_options
def evaluate(
    model: Model,
    *,
    policies: Annotated[
        str, option("--policies", help="A,B,C as in bench --policy.", metavar="A,B,C")
    ] = "understudy",
    data: Data = None,
    sets: Annotated[int, option("--sets", help="Prompt sets, 5 or more.", metavar="N")] = 5,
    prompt: Annotated[
        int, option("--prompt-tokens", "-p", help="Read before scoring.", metavar="N", min=1)
    ] = 64,
    tokens: Annotated[
        int, option("--tokens", help="Scored per piece of text.", metavar="N", min=2)
    ] = 128,
    problems: Annotated[
        int, option("--problems", help="With one right answer; greedy.", metavar="N", min=0)
    ] = 0,
    controls: Annotated[
        bool, option("--controls/--no-controls", help="Random, drop and fewer bits beside.")
    ] = True,
    seed: Annotated[int, option("--seed", help="Of problems and drawn experts.", metavar="N")] = 0,
    json: Json = False,
    output: Output = None,
    options: EngineOptions,
) -> int:
    """Judge the answers of policies, one decode step at a time.

    Everything is per decoded token and against the exact run; intervals are 95 %.
    """
    from understudy import quality
    from understudy.bench import Policy

    chosen = [Policy.parse(name) for name in dict.fromkeys(policies.split(","))]
    exam = quality.Exam(
        model=model,
        memory=options.memory,
        data=tuple(map(str, data or ())),
        sets=sets,
        prompt=prompt,
        scored=tokens,
        problems=problems,
        seed=seed,
        settings=tuple(settings_of(options).items()),
    )
    with screen.progress() as bar:
        session.quiet_guests()
        with quality.session(exam, bar("the exact run")) as opened:
            verdicts = [opened.baseline_verdict()]
            for policy in [*chosen, *matched(chosen, controls)]:
                if policy.name != verdicts[0].policy:
                    verdicts.append(opened.judge(policy, bar(policy.name)))
            if controls and not all(policy.exact for policy in chosen):
                verdicts += fewer_bits(opened, model, bar)
    told = asdict(exam)
    told["settings"] = {name: None if v is None else str(v) for name, v in exam.settings}
    result = {"exam": told, "verdicts": [asdict(v) for v in verdicts]}
    if output is not None:
        write_whole(output, json_text.dumps(result, indent=1) + "\n")
    screen.show(table(model, verdicts), json_too=json)
    for line in remarks(verdicts):
        screen.say(line)
    if json:
        screen.write_json(result)
    return NOT_EXACT if any(v.broken for v in verdicts) else 0


def settings_of(options: EngineOptions) -> dict[str, Any]:
    """Options of the engine that are the same for every policy."""
    told = options.as_arguments()
    for name in ("memory", "evictor", "predictor", "route", "resolver"):
        del told[name]
    return told


def matched(chosen: Sequence[Policy], wanted: bool) -> list[Policy]:
    """Controls at a matched count, once each."""
    from understudy.quality import controls

    named = {policy.route for policy in chosen}
    made = {c.route: c for policy in chosen for c in controls(policy)} if wanted else {}
    return [control for route, control in made.items() if route not in named]


def fewer_bits(opened: Session, model: str, bar: Any) -> list[Verdict]:
    """The control at matched bytes: every expert in int8, and in int4, on demand."""
    from dataclasses import replace

    from understudy.bench import ON_DEMAND
    from understudy.quality import packed

    found = []
    for format in ("int8", "int4"):
        try:
            folder = packed(model, format, bar)
        except UnderstudyError as error:
            screen.say(f"note: no control in {format}: {error}")
            continue
        policy = replace(ON_DEMAND, name=f"all {format}")
        found.append(opened.judge(policy, bar(policy.name), str(folder)))
    return found


def table(model: str, verdicts: Sequence[Verdict]) -> Table:
    grid = screen.grid(
        "policy", "NLL lost", "95 %", "KL", "same top-1", "solved", "changed", "skipped", "mass",
        "read", "hits", "stall ms", "ms",
        title=f"{Path(model).name}: against the exact run, per decoded token",
    )  # fmt: skip
    for v in verdicts:
        grid.add_row(*row(v))
    return grid


def row(v: Verdict) -> list[str]:
    from understudy.plan import shown_size

    lost = v.delta_nll
    return [
        v.policy,
        f"{lost.mean:+.4f}",
        f"{lost.low:+.4f}..{lost.high:+.4f}",
        f"{v.kl.mean:.4f}",
        f"{100 * v.same_top1.mean:.1f} %",
        "-" if v.solved is None else f"{100 * v.solved:.0f} %",
        f"{v.substituted:.2f}",
        f"{v.skipped:.2f}",
        f"{v.substituted_mass + v.skipped_mass:.3f}",
        shown_size(round(v.bytes)),
        f"{100 * v.hit_rate:.0f} %",
        f"{1000 * v.stall:.1f}",
        f"{1000 * v.seconds:.1f}",
    ]


def remarks(verdicts: Sequence[Verdict]) -> list[str]:
    """What a reader must not overlook."""
    found = [f"NOT exact, though it says so: {v.policy}; please report this"
             for v in verdicts if v.broken]  # fmt: skip
    found += [f"{v.policy} never acted: nothing was missing that it may change"
              for v in verdicts if v.never_acted]  # fmt: skip
    return found


def write_whole(path: Path, text: str) -> None:
    """All of it or nothing."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as e:
        raise UnderstudyError(f"cannot write {path}: {e.strerror}") from e
