"""The commands that measure: ``demo`` and ``bench``.

Knows: how rows become tables. Does not know: how they are measured (`bench`, `demo`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table

from understudy.cli import screen, session
from understudy.cli.options import EngineOptions, Json, Model, option, takes_engine_options
from understudy.core import UnderstudyError

if TYPE_CHECKING:
    from understudy.bench import Rates, Row
    from understudy.demo import Outcome

NOT_EXACT = 1  # exit code: everything ran, and the answer is no

# ----------------------------------------------------------------------------------------- demo


def demo(
    *,
    small: Annotated[
        bool, option("--small", help="Compare on the small model itself; writes no twin.")
    ] = False,
    rounds: Annotated[int, option("--rounds", help="Timed rounds.", metavar="N", min=1)] = 5,
    json: Json = False,
) -> int:
    """Show it: text, then three ways of running compared.

    The text comes with 40 % of the experts in memory; the table from a wide twin of the model.
    """
    from understudy.demo import OPENING, compare, reference_model, tell, twin_of

    with screen.waiting("loading"):
        session.quiet_guests()
        model = reference_model()
    screen.say(f"{model.name}: it continues {OPENING!r}; experts are read from disk as needed")
    tell(model, screen.write if not json else screen.write_beside, screen.say)
    with screen.progress() as bar:
        subject = model if small else twin_of(model, bar)
        outcome = compare(subject, bar, rounds)
    screen.show(comparison(outcome), json_too=json)
    (screen.say if json else screen.tell)(verdict(outcome))
    if json:
        screen.write_json(outcome.as_dict())
    return 0 if outcome.exact else NOT_EXACT


def comparison(outcome: Outcome) -> Table:
    """The demo's table."""
    from understudy.plan import shown_size

    held = 100 * outcome.expert_budget_bytes / max(1, outcome.expert_bytes)
    table = screen.grid(
        "", "ms", "min-max", "first", "read", "hits", "late", "missed", "stall", "own", "belady",
        title=f"{outcome.model}: {shown_size(outcome.expert_bytes)} of experts, {held:.0f} % held; "
        "ms and bytes per token; floors: own, belady",
    )  # fmt: skip
    for row in outcome.rows:
        seconds, lookups = row.seconds, max(1, row.counters.lookups)
        shares = (row.counters.hits, row.counters.late, row.counters.misses)
        table.add_row(
            row.policy,
            _ms(seconds.median),
            f"{_ms(seconds.low)}-{_ms(seconds.high)}",
            _ms(outcome.ttft[row.policy]),
            shown_size(row.bytes),
            *(f"{100 * share / lookups:.0f} %" for share in shares),
            *(_ms(x) for x in (row.stall, row.floor_own, row.floor_belady)),
        )
    return table


def verdict(outcome: Outcome) -> str:
    if outcome.exact:
        return (
            f"exact: all {outcome.tokens} tokens and every bit of their logits equal the fully "
            f"resident run, all {len(outcome.rows)} ways ({_speeds(outcome.rates)})"
        )
    return "NOT exact: tokens or logits differ from the fully resident run; please report this"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f}" if seconds < 0.1 else f"{1000 * seconds:.0f}"


def _speeds(rates: Rates) -> str:
    return f"disk {_gb(rates.disk)}, memory {_gb(rates.memory)}, both as measured in this run"


def _gb(rate: float | None) -> str:
    return "-" if not rate else f"{rate / 1e9:.2f} GB/s"


# ---------------------------------------------------------------------------------------- bench


@takes_engine_options
def bench(
    model: Model,
    *,
    policy: Annotated[
        str | None,
        option(
            "--policy",
            metavar="A,B,C",
            help="Compare in turns: no-cache, understudy, EVICTOR or EVICTOR+PREDICTOR.",
        ),
    ] = None,
    prompt: Annotated[
        int | None,
        option("--prompt-tokens", "-p", help="Default: 512, or what fits.", metavar="N", min=1),
    ] = None,
    generate: Annotated[
        int, option("--new-tokens", "-n", help="Generated.", metavar="N", min=1)
    ] = 128,
    repeats: Annotated[
        int, option("--repeats", "-r", help="Timed rounds.", metavar="N", min=1)
    ] = 5,
    json: Json = False,
    options: EngineOptions,
) -> None:
    """Measure tokens per second, with floors.

    Rows: pp reads a prompt, tg writes. A floor is what no program can beat on this machine.
    """
    from understudy.bench import Policy, measure, open_all

    if policy is None:
        own = f"{options.evictor}+{options.predictor}"
        policies = [Policy(own, options.evictor, options.predictor)]
    else:
        policies = [Policy.parse(name) for name in dict.fromkeys(policy.split(","))]
    with ExitStack() as stack:
        with screen.waiting(f"loading {model}"):
            session.quiet_guests()
            engines = stack.enter_context(open_all(model, policies, **options.as_arguments()))
        for engine in engines.values():
            screen.say(engine.plan.line())
        length = prompt or prompt_that_fits(next(iter(engines.values())).plan.context, generate)
        bar = stack.enter_context(screen.progress())
        label = f"{repeats} rounds of {', '.join(engines)}, and one to warm up"
        rows, rates = measure(engines, length, generate, repeats, bar(label), options.io_threads)
    screen.show(rates_table(model, rows), json_too=json)
    screen.say(_speeds(rates))
    if json:
        screen.write_json({"model": model, "rows": [bench_row(row) for row in rows]})


def prompt_that_fits(context: int, generated: int) -> int:
    """512 tokens, or what the context leaves beside the answer."""
    room = context - generated - 1
    if room < 1:
        raise UnderstudyError(
            f"{generated} new tokens leave no room for a prompt in a context of {context}; "
            "try a smaller --new-tokens"
        )
    return min(512, room)


def rates_table(model: str, rows: Sequence[Row]) -> Table:
    from understudy.plan import shown_size

    table = screen.grid(
        "", "policy", "tokens/s", "min-max", "own", "belady", "read", "hits", "stall",
        title=f"{Path(model).name}: tokens/s and what its floors allow; bytes and stall per token",
    )  # fmt: skip
    for row in rows:
        rate = row.rate
        hits = 100 * row.counters.hits / max(1, row.counters.lookups)
        table.add_row(
            row.name,
            row.policy,
            f"{_rate(rate.median)} ± {_rate(rate.deviation)}",
            f"{_rate(rate.low)}-{_rate(rate.high)}",
            _inverse(row.floor_own),
            _inverse(row.floor_belady),
            shown_size(row.bytes),
            f"{hits:.0f} %",
            f"{_ms(row.stall)} ms",
        )
    return table


def _rate(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _inverse(seconds: float) -> str:
    """A floor of time is a ceiling of tokens per second."""
    return f"< {_rate(1 / seconds)}" if seconds else "-"


def bench_row(row: Row) -> dict[str, Any]:
    """One row of ``bench --json``."""
    rate = row.rate
    return {
        "test": row.name,
        "policy": row.policy,
        "tokens_per_second": round(rate.median, 4),
        "min": round(rate.low, 4),
        "max": round(rate.high, 4),
        "deviation": round(rate.deviation, 4),
        "bytes_per_token": round(row.bytes),
        "hits": row.counters.hits,
        "late": row.counters.late,
        "misses": row.counters.misses,
        "stall_ms": round(1000 * row.stall, 3),
        "floor_own_ms": round(1000 * row.floor_own, 4),
        "floor_belady_ms": round(1000 * row.floor_belady, 4),
    }
