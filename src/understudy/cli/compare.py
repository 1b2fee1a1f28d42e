"""The arena: ``compare``.

Knows: which policies are worth naming, how entries become a table and a report. Does not know: how
they are measured (`compare`, `quality`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table

from understudy.cli import screen, session
from understudy.cli.evaluate import NOT_EXACT, Data, settings_of
from understudy.cli.options import EngineOptions, Json, Model, option, takes_engine_options

if TYPE_CHECKING:
    from understudy.bench import Policy
    from understudy.compare import Contest, Entry, Quality
    from understudy.quality import Exam, Session


@takes_engine_options
def compare(
    model: Model,
    *,
    policies: Annotated[
        str | None,
        option("--policies", help="A,B,C; default: all that are worth naming.", metavar="A,B,C"),
    ] = None,
    data: Data = None,
    rounds: Annotated[
        int, option("--rounds", help="Timed rounds per policy.", metavar="N", min=1)
    ] = 5,
    sets: Annotated[int, option("--sets", help="Prompt sets, 5 or more.", metavar="N")] = 5,
    prompt: Annotated[
        int, option("--prompt-tokens", "-p", help="Read before decoding.", metavar="N", min=1)
    ] = 128,
    tokens: Annotated[
        int, option("--tokens", help="Scored per piece of text.", metavar="N", min=2)
    ] = 64,
    new_tokens: Annotated[
        int, option("--new-tokens", "-n", help="Decoded per timed round.", metavar="N", min=2)
    ] = 33,
    output: Annotated[
        Path | None,
        option("--output", "-o", help="Folder of the report; default: beside you.", metavar="DIR"),
    ] = None,
    json: Json = False,
    options: EngineOptions,
) -> int:
    """Put every policy through the same race and the same exam, and mark the best.

    Each is timed in turns with on-demand on the same text. A run that was interrupted goes on.
    """
    from understudy import compare as arena
    from understudy.quality import Exam

    chosen = named(policies, options)
    folder = output or Path(f"compare-{Path(model).name}-{options.memory.replace('%', 'pc')}")
    settings = tuple(settings_of(options).items())
    contest = arena.Contest(
        model, options.memory, rounds, prompt, new_tokens, settings,
        exam=(tuple(map(str, data or ())), sets, tokens),
    )  # fmt: skip
    exam = Exam(
        model=model, memory=options.memory, data=tuple(map(str, data or ())), sets=sets,
        prompt=prompt, scored=tokens, settings=settings,
    )  # fmt: skip
    with ExitStack() as stack:
        bar = stack.enter_context(screen.progress())
        session.quiet_guests()
        judge = Judge(exam, bar, stack)
        entries = arena.run(contest, chosen, folder, judge, bar)
    about = told(contest, chosen, options)
    arena.write_report(entries, contest, about, folder)
    screen.show(table(entries, about[0]), json_too=json)
    for entry in entries:
        if entry.why:
            screen.say(f"{entry.policy}: not run: {entry.why}")
    screen.say(f"report: {folder / 'report.html'}, .png, .json")
    if json:
        screen.write_json(arena.as_dict(entries, contest, about))
    return NOT_EXACT if any(e.broken for e in entries) else 0


class Judge:
    """Scores policies; the exact run is made when the first one asks, and once."""

    def __init__(self, exam: Exam, bar: Any, stack: ExitStack) -> None:
        self._exam, self._bar, self._stack = exam, bar, stack
        self._session: Session | None = None

    def __call__(self, policy: Policy, report: Any) -> Quality:
        from understudy.bench import ON_DEMAND
        from understudy.compare import Quality
        from understudy.quality import session

        if self._session is None:
            opened = session(self._exam, self._bar("quality: the exact run"))
            self._session = self._stack.enter_context(opened)
        same = policy.name == ON_DEMAND.name
        judged = self._session
        v = judged.baseline_verdict() if same else judged.judge(policy, report)
        return Quality(
            delta_nll=v.delta_nll.mean,
            delta_low=v.delta_nll.low,
            delta_high=v.delta_nll.high,
            kl=v.kl.mean,
            same_top1=v.same_top1.mean,
            substituted=v.substituted,
            skipped=v.skipped,
            lost_mass=v.substituted_mass + v.skipped_mass,
            identical=v.identical,
        )


def named(policies: str | None, options: EngineOptions) -> list[Policy]:
    """Those that were asked for; else all presets that this run has what they need for, the
    baseline first."""
    from understudy.bench import ON_DEMAND, PRESETS, Policy

    if policies is not None:
        asked = [Policy.parse(name) for name in dict.fromkeys(policies.split(","))]
        return [ON_DEMAND, *(p for p in asked if p.name != ON_DEMAND.name)]
    others = [p for name, p in PRESETS.items() if name != ON_DEMAND.name]
    if options.profile is None:
        others = [p for p in others if not p.needs_profile]
        screen.say("note: policies that need a profile are left out; see `understudy profile`")
    return [ON_DEMAND, *others]


def told(contest: Contest, policies: Sequence[Policy], options: EngineOptions) -> list[str]:
    """What a reader of the report has to know."""
    held = f"slots: {options.slots}" if options.slots else f"memory: {contest.memory}"
    return [
        f"{Path(contest.model).name}, {held}, {len(policies)} policies",
        f"Speed: {contest.rounds} rounds in turns with on-demand, {contest.prompt_tokens} tokens "
        f"read, {contest.new_tokens} decoded, the same text for all. Time per token is the "
        "median of the rounds' ratios to on-demand, times the median of all on-demand rounds.",
        "NLL lost, KL and same top-1: against the exact run, scored one decode step at a time; "
        "95 % by a bootstrap over prompt sets and blocks of tokens. Changed: (token, rank) pairs "
        "per token that ran elsewhere or not at all; mass: their router weight.",
    ]


SHOWN = (
    "policy", "ms/token", "x on-demand", "min-max", "read/token", "hits", "NLL lost", "95 %",
    "same top-1", "changed", "front",
)  # fmt: skip


def table(entries: Sequence[Entry], title: str) -> Table:
    """What fits a terminal; the report has all columns."""
    from understudy import compare as arena

    grid = screen.grid(*SHOWN, title=title)
    places = [arena.COLUMNS.index(name) for name in SHOWN]
    for row in arena.cells([e for e in entries if e.speed is not None]):
        grid.add_row(*(row[place] for place in places))
    return grid
