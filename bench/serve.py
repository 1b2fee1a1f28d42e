"""How many tokens per second does a batch write, beside the bytes that its routing needs?

    python bench/serve.py [--models fine,coarse] [--batches 1,8,32] [--slots 33%] [--repeats 5]
                          [--smoke] [--json]

The batching engine itself, without HTTP: batches of different sizes take turns on one engine that
holds ``--slots`` of the wide twin's experts, each continues real text (dictated: every size decodes
text, none decodes what it prefers), and only steps in which the whole batch writes are counted.

    the byte bound    the union of experts of every (step, layer) was recorded. It is replayed
                      through the engine's own evictor with the same slots, nobody speculating:
                      what is missed there must be read, whoever schedules. Bytes / the link's best
                      bandwidth of this run, or the weights that a step touches / memory bandwidth,
                      whichever takes longer
    read              the same with the bytes that the engine really read, useless ones left out
    clairvoyant       the same with what an evictor who knows the future would miss

Experts are read past the page cache, so nothing but the slots holds them. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import card as cards
from bench import cells as places
from bench import contest, show
from bench.batches import Rounds, Score, ratios
from bench.match import Course, Rates
from understudy.batch.opening import start
from understudy.batch.paged import PAGE
from understudy.core import UnderstudyError

TARGET = 0.85  # of the byte bound, from batch 8 on

COLUMNS = (
    ("model", lambda r: r["model"]),
    ("batch", lambda r: str(r["batch"])),
    ("tokens/s", lambda r: f"{r['tokens_per_second']:.2f}"),
    ("min-max", lambda r: f"{r['tokens_per_second_min']:.2f}-{r['tokens_per_second_max']:.2f}"),
    ("bound", lambda r: f"{r['bound_tokens_per_second']:.2f}"),
    ("of bound", lambda r: f"{r['of_bound']:.2f}"),
    ("of read", lambda r: f"{r['of_read']:.2f}"),
    ("of clairvoyant", lambda r: f"{r['of_clairvoyant']:.2f}"),
    ("ms/step", lambda r: show.ms(r["step_ms"])),
    ("stall", lambda r: show.ms(r["stall_ms"])),
    ("union/step", lambda r: show.size(r["union_bytes"])),
    ("must read", lambda r: show.size(r["bound_bytes"])),
    ("read", lambda r: show.size(r["read_bytes"])),
    ("hits", lambda r: show.percent(r["hit_rate"])),
)


def measure(model: str, twin: Path, options: argparse.Namespace) -> tuple[list[Any], Rates]:
    """The rows of one model. The first round of each size warms up."""
    largest = max(options.batches)
    engine = start(
        twin,
        memory=options.memory,
        slots=options.slots,
        max_num_seqs=largest,
        max_context=-(-(options.prompt_tokens + options.new_tokens) // PAGE) * PAGE,
        on_status=show.say,
    )
    try:
        rounds = Rounds(engine)
        rates = _rates(twin, rounds.plan.expert_bytes)
        course = contest.texts(
            twin, largest * (options.repeats + 1), options.prompt_tokens, options.new_tokens
        )
        scores = [Score(size) for size in options.batches]
        _alternate(rounds, scores, course, rates, model)
        return [score.row(model, rounds.plan.dense, rates) for score in scores], rates
    finally:
        engine.close()
        engine.engine.close()


def _rates(twin: Path, expert_bytes: int) -> Rates:
    file = max(places.weight_files(twin), key=lambda f: f.stat().st_size)
    rates = Rates(file, min(8 << 20, expert_bytes))
    rates.measure()
    return rates


def _alternate(
    rounds: Rounds, scores: Sequence[Score], course: Course, rates: Rates, model: str
) -> None:
    """A B C A B C: every round has its own texts, smaller batches the first of them."""
    largest = max(score.batch for score in scores)
    count = len(course.prompts) // largest
    report = show.progress(f"{model}: {count} rounds of {len(scores)} batch sizes")
    for number in range(count):
        for done, score in enumerate(scores, number * len(scores)):
            texts = slice(number * largest, number * largest + score.batch)
            lap = rounds.round(course.prompts[texts], course.answers[texts])
            rates.saw(lap.link_rate)
            if number > 0:
                score.laps.append(lap)
            report(done + 1, count * len(scores))
        rates.measure()


# --------------------------------------------------------------------------------------- command


def sizes(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", default="fine,coarse", help="(%(default)s)")
    parser.add_argument("--batches", type=sizes, default="1,8,32", help="(%(default)s)")
    parser.add_argument("--slots", default="33%", help="of the experts (%(default)s)")
    parser.add_argument("--memory", default="auto", help="must hold them (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="counted rounds (%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=49, help="(%(default)s)")
    parser.add_argument("--smoke", action="store_true", help="small twins, few rounds")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    parser.add_argument("--output", type=Path, help="write the JSON there, too")
    if "--smoke" in sys.argv:
        parser.set_defaults(repeats=2, batches="1,4", prompt_tokens=16, new_tokens=9)
    return parser.parse_args()


def main() -> int:
    options = arguments()
    try:
        twins = {
            name: places.twin(places.Cell.parse(f"{name}:ram").model, show.progress, options.smoke)
            for name in options.models.split(",")
        }
        note = (
            f"{options.repeats} rounds and one to warm up, batches of "
            f"{', '.join(map(str, options.batches))} in turns; "
            f"{options.prompt_tokens} tokens of real text each, then {options.new_tokens} more of "
            f"it, dictated; {options.slots} of the experts held, reads past the page cache"
        )
        card = cards.card(twins, note)
        cards.show(card)
        rows: list[dict[str, Any]] = []
        for name, twin in twins.items():
            found, rates = measure(name, twin, options)
            rows += found
            card.setdefault("rates", {})[name] = {
                "disk_bytes_per_second": round(rates.disk),
                "memory_bytes_per_second": round(rates.memory),
            }
    except UnderstudyError as error:
        show.say(f"error: {error}")
        return 2
    if not options.json:
        print(show.table(rows, COLUMNS))
        print()
        print(show.ratios_text(ratios(rows)))
    last = json.dumps({"rows": rows, "ratios": ratios(rows), "target": TARGET, "card": card})
    if options.output:
        options.output.write_text(last + "\n", encoding="utf-8")
    print(last)
    return 0


if __name__ == "__main__":
    sys.exit(main())
