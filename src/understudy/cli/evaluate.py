"""The command that judges answers: ``eval``.

Knows: how verdicts become a table, JSON, remarks and an exit code. Does not know: how they are
reached (`quality`).
"""

from __future__ import annotations

import json as json_text
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from understudy.cli import screen, session
from understudy.cli.options import EngineOptions, Json, Model, option, takes_engine_options
from understudy.core import UnderstudyError
from understudy.whole import keep

if TYPE_CHECKING:
    from understudy.bench import Policy
    from understudy.quality import Bar, Exam, Session, Verdict

NOT_EXACT, NOT_ALL = 1, 2  # exit codes: a policy lied about being exact; a policy could not run

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
        int, option("--problems", help="Of each of 7 kinds; greedy answers.", metavar="N", min=0)
    ] = 20,
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
    if output is not None:
        require_writable(output)
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
    session.quiet_guests()
    with screen.progress() as bar, quality.session(exam, bar("the exact run")) as opened:
        verdicts, failed = judge_all(opened, chosen, controls, bar)
        result = as_result(opened.exam, verdicts, failed)
    if output is not None:
        keep(output, json_text.dumps(result, indent=1) + "\n")
    screen.show(table(model, verdicts), json_too=json)
    if not all(v.exact for v in verdicts):
        screen.show(domains_table(verdicts), json_too=json)
    if problems:
        screen.show(solved_table(verdicts), json_too=json)
    for line in remarks(verdicts, result["controls"]):
        screen.say(line)
    screen.say(f"seeds: problems and drawn experts {seed}, intervals 0")
    for name, why in failed.items():
        screen.complain(f"{name} could not be judged: {why}")
    if json:
        screen.write_json(result)
    if any(v.broken for v in verdicts):
        return NOT_EXACT
    return NOT_ALL if failed else 0


def settings_of(options: EngineOptions) -> dict[str, Any]:
    """Options of the engine that are the same for every policy."""
    told = options.as_arguments()
    for name in ("memory", "evictor", "predictor", "route", "resolver"):
        del told[name]
    return told


# ------------------------------------------------------------------------------------ what is run


def judge_all(
    opened: Session, chosen: Sequence[Policy], with_controls: bool, bar: Bar
) -> tuple[list[Verdict], dict[str, str]]:
    """The exact run, every policy and its controls; and name -> reason of those that cannot run.
    Hours of work are not thrown away because one of many lacks something."""
    verdicts, failed = [opened.baseline_verdict()], {}
    for policy, of, format in everyone(chosen, with_controls):
        if policy.name == verdicts[0].policy or of in failed:
            continue
        rate = next((v.changed for v in verdicts if v.policy == of), None)
        try:
            verdicts.append(judge(opened, policy, rate, format, bar))
        except UnderstudyError as error:
            failed[policy.name] = str(error)
    return verdicts, failed


def judge(
    opened: Session, policy: Policy, rate: float | None, format: str | None, bar: Bar
) -> Verdict:
    from understudy.quality import packed

    other = None if format is None else str(packed(opened.exam.model, format, bar))
    return opened.judge(policy, bar(policy.name), other, rate)


def everyone(
    chosen: Sequence[Policy], with_controls: bool
) -> Iterator[tuple[Policy, str, str | None]]:
    """(policy, name of the one whose count it is held to, weight format where it is another): the
    policies, each with its controls after it; if one is lossy, every expert in fewer bits at the
    same memory."""
    from dataclasses import replace

    from understudy.bench import ON_DEMAND
    from understudy.quality import controls

    for policy in chosen:
        yield policy, "", None
        for control in controls(policy) if with_controls else ():
            yield control, policy.name, None
    if with_controls and not all(policy.exact or policy.equivalent for policy in chosen):
        for format in ("int8", "int4"):
            yield replace(ON_DEMAND, name=f"all {format}"), "", format


# -------------------------------------------------------------------------------------- results


def as_result(exam: Exam, verdicts: Sequence[Verdict], failed: dict[str, str]) -> dict[str, Any]:
    """All of it, for JSON: sums per block and answers per problem allow intervals to be drawn
    again."""
    from understudy.intervals import BLOCK

    settings = {k: str(v) if isinstance(v, Path) else v for k, v in exam.settings}
    return {
        "exam": {**asdict(exam), "settings": settings, "block": BLOCK},
        "verdicts": [
            {
                **asdict(v),
                "never_acted": v.never_acted,
                "uncounted": v.uncounted,
                "broken": v.broken,
            }
            for v in verdicts
        ],
        "controls": matched(verdicts),
        "failed": failed,
    }


def matched(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """How near each control is to what it controls for: expert slots changed per token, or bytes
    read per token, of both; and the NLL lost beyond the control's, paired."""
    from understudy.quality import paired

    found: list[dict[str, Any]] = []
    for v in verdicts:
        if not v.lossy or v.format or v.policy.endswith(")"):
            continue
        for other in verdicts:
            if other.policy.startswith(f"{v.policy} ("):
                pair = {"by": "changed", "own": v.changed, "control": other.changed}
            elif other.format:
                pair = {"by": "bytes", "own": v.bytes, "control": other.bytes}
            else:
                continue
            beyond = asdict(paired(v, other))
            found.append({"policy": v.policy, "against": other.policy, **pair, "beyond": beyond})
    return found


def table(model: str, verdicts: Sequence[Verdict]) -> Table:
    grid = screen.grid(
        "policy", "NLL lost", "95 %", "KL", "same top-1", "subst.", "skipped", "mass",
        "read", "hits", "stall ms", "ms",
        title=f"{Path(model).name}: against the exact run, per decoded token",
    )  # fmt: skip
    for v in verdicts:
        grid.add_row(*row(v))
    return grid


def row(v: Verdict) -> list[str]:
    from understudy.plan import shown_size

    return [
        v.policy,
        *lost(v.delta_nll),
        f"{v.kl.mean:.4f}",
        f"{100 * v.same_top1.mean:.1f} %",
        f"{v.substituted:.2f}",
        f"{v.skipped:.2f}",
        f"{v.substituted_mass + v.skipped_mass:.3f}",
        shown_size(round(v.bytes)),
        f"{100 * v.hit_rate:.0f} %",
        f"{1000 * v.stall:.1f}",
        f"{1000 * v.seconds:.1f}",
    ]


def lost(figure: Any) -> list[str]:
    return [f"{figure.mean:+.4f}", f"{figure.low:+.4f}..{figure.high:+.4f}"]


def domains_table(verdicts: Sequence[Verdict]) -> Table:
    """What is lost where; exact rows lose nothing anywhere."""
    domains = list(verdicts[0].nll_by_domain)
    grid = screen.grid("NLL lost in", *domains)
    for v in verdicts:
        if not v.exact:
            found = (lost(v.nll_by_domain[domain]) for domain in domains)
            grid.add_row(v.policy, *(f"{mean} ({bounds})" for mean, bounds in found))
    return grid


def solved_table(verdicts: Sequence[Verdict]) -> Table:
    """Share of right answers; the last column is the difference to the exact run, paired."""
    kinds = list(verdicts[0].solved)
    grid = screen.grid(
        "solved", *kinds, "difference", "95 %",
        title=f"exact match on {verdicts[0].solved['all'].problems} held-out problems, in %",
    )  # fmt: skip
    for v in verdicts:
        delta = v.solved["all"].delta
        shares = [f"{100 * v.solved[kind].right:.0f}" for kind in kinds]
        bounds = f"{100 * delta.low:+.1f}..{100 * delta.high:+.1f}"
        grid.add_row(v.policy, *shares, f"{100 * delta.mean:+.1f}", bounds)
    return grid


def remarks(verdicts: Sequence[Verdict], controls: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What a reader must not overlook."""
    from understudy.plan import shown_size

    for v in verdicts:
        if v.broken:
            yield f"NOT exact, though it says so: {v.policy}; please report this"
        if v.never_acted:
            yield f"{v.policy} never acted: nothing was missing that it may change"
        if v.uncounted:
            yield f"{v.policy} changed weights only: no expert was substituted or skipped"
    for c in controls:
        own, control = c["own"], c["control"]
        near = f"{control / own:.2f} times" if own else "no ratio"
        low, high = c["beyond"]["low"], c["beyond"]["high"]
        beyond = f"NLL lost beyond it {c['beyond']['mean']:+.4f} ({low:+.4f}..{high:+.4f})"
        if c["by"] == "changed":
            yield (f"matched count: {c['policy']} changed {own:.2f} experts per token, "
                   f"{c['against']} {control:.2f} ({near}); {beyond}")  # fmt: skip
        else:
            yield (f"same memory: {c['policy']} read {shown_size(round(own))} per token, "
                   f"{c['against']} {shown_size(round(control))} ({near}); "
                   f"{beyond}")  # fmt: skip


def require_writable(path: Path) -> None:
    """Said before hours of work, not after them."""
    if not path.parent.is_dir():
        raise UnderstudyError(f"{path.parent} is no folder: create it, or name another -o")
