"""How fast is a model whose experts do not fit the GPU: by host, by device, beside others?

    python bench/gpu.py --trace FILE [--budget-minutes 8] [--models twin,qwen3] [--rows lru,device]
                        [--only micro,twin:50] [--budgets 50,25,75,10] [--smoke] [--json]

One command: it looks what is missing, makes its models, measures memory, link and kernels, plays
every cell it has time for (the most informative first), and prints one table, the targets, and
JSON as the last line. ``--trace`` is a public route CSV of Qwen3-30B-A3B; without it the rows of
``qwen3`` are left out by name. Models are kept in the cache folder, logs and what is known so far
in ``--work``. Before a long run, ``--smoke --device cuda`` tries everything once with small models.

Models and rows are described in `bench/device/subjects.py` and `bench/device/ways.py`. Each model
is measured in a process of its own: one that the GPU took down costs a row, not the run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:1] = [str(ROOT), str(ROOT / "src")]  # a machine that is lent may have no install

from bench import card as cards
from bench import show
from bench.device import figures, micro, schedule, subjects, ways
from bench.device.figures import Facts, Rates, Turn
from bench.device.parent import Child, Lost, Message, Refused, Shift
from bench.device.schedule import Task, TimeBudget
from understudy import native
from understudy.core import UnderstudyError

Row = dict[str, Any]
PREPARE_SECONDS = 240.0  # a model that takes longer is not waited for
GRACE = 45.0  # seconds that what is under way may take beyond the budget
PREFILL_ROWS = ("lru+hint", "accelerate")
SMALL = micro.Sizes(hidden=64, width=32, k=2, arena=1 << 20, device=1 << 22, link=1 << 22,
                    cpu=64 << 20, repeats=2)  # fmt: skip


# ------------------------------------------------------------------------------ the environment


def missing(device: str) -> list[str]:
    """What this machine lacks, each in a few words with its cure. Empty: all is here."""
    return list(_missing(device))


def _missing(device: str) -> Iterator[str]:
    from importlib.util import find_spec

    import torch
    import transformers

    if device != "cpu" and not torch.cuda.is_available():
        yield f"an accelerator (torch {torch.__version__} sees none)"
    version = tuple(int(n) for n in transformers.__version__.split(".")[:2])
    if version < (5, 23):
        yield f"transformers 5.23 (here: {transformers.__version__})"
    for package, what in (("triton", "the kernels"), ("accelerate", "the row accelerate")):
        if device != "cpu" and find_spec(package) is None:
            yield f"{package}, for {what}"
    if why := native.why_not():
        yield f"the native kernel, for misses computed by the CPU: {why}"


def accelerator(device: str) -> dict[str, Any]:
    """Asked in a process that never computes: the children own the device."""
    if device == "cpu":
        return {}
    import torch

    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "cuda": torch.version.cuda,
    }


# ------------------------------------------------------------------------------------ the run


@dataclass
class Run:
    """All that was measured, raw, and who measures it."""

    options: argparse.Namespace
    budget: TimeBudget
    cells: list[Message] = field(default_factory=list)
    prefill: list[Message] = field(default_factory=list)
    figures: dict[str, Message] = field(default_factory=dict)
    facts: dict[str, Facts] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)  # model -> why
    shifts: dict[str, Shift] = field(default_factory=dict)

    def start(self, kinds: Iterable[str]) -> None:
        """A child for every kind of work imports and makes its model, all at once."""
        o = self.options
        wanted = subjects.Wanted(
            rounds=o.rounds, prompt_tokens=o.prompt_tokens, new_tokens=o.new_tokens,
            trace=None if o.trace is None else str(o.trace.resolve()), recall=o.recall,
            small=o.smoke,
        )  # fmt: skip
        common: Message = {"device": o.device, "profile": o.profile}
        for name in dict.fromkeys(map(_shift, kinds)):
            model = {} if name == "micro" else {"model": name, "wanted": asdict(wanted)}
            prepare = {**common, **model}
            log = o.work / f"{name}.log"
            self.shifts[name] = Shift(prepare, PREPARE_SECONDS, partial(Child, log))
            self.shifts[name].begin()
        for name, shift in self.shifts.items():
            try:
                for message in shift.prepared():
                    self.facts[name] = Facts(**message["facts"])
            except (Lost, Refused) as e:
                self.absent[name] = str(e)
                show.say(f"{name}: left out, {e}")

    def carry_out(self, task: Task) -> None:
        if task.kind == "micro":
            self._micro(micro.NAMES)
        elif task.kind == "formats":
            self._micro(micro.FORMATS)
        elif task.kind == "prefill":
            self._prefill(task)
        else:
            self._cell(task)

    def _micro(self, names: Sequence[str]) -> None:
        def tell(message: Message) -> str | None:
            if "micro" not in message:
                return None
            self.figures[message["micro"]["name"]] = message["micro"]
            return str(message["micro"]["name"])

        sizes = SMALL if self.options.smoke else micro.Sizes()
        rates = {name: f["rate"] for name, f in self.figures.items() if f["rate"]}
        failed = self.shifts["micro"].carry_out(
            "micro", "names", names, self._seconds, tell, rates=rates, sizes=asdict(sizes)
        )
        for name, reason in failed.items():
            self.figures[name] = {"name": name, "rate": None, "skipped": reason}

    def _cell(self, task: Task) -> None:
        def tell(message: Message) -> str | None:
            if "contestant" not in message:
                return None
            self.cells.append(message)
            self._keep()
            return str(message["contestant"])

        names = [way.name for way in ways.chosen(self.options.rows)]
        failed = self.shifts[task.kind].carry_out(
            "cell", "ways", names, self._seconds, tell,
            percent=task.percent, within=self.budget.left,
        )  # fmt: skip
        self.cells += [self._failed(task.kind, task, *one) for one in failed.items()]

    def _prefill(self, task: Task) -> None:
        def tell(message: Message) -> str | None:
            if "contestant" not in message:
                return None
            self.prefill.append(message)
            return str(message["contestant"])

        o = self.options
        failed = self.shifts["twin"].carry_out(
            "prefill", "ways", PREFILL_ROWS, self._seconds, tell,
            percent=task.percent, tokens=o.long_prompt, rounds=o.rounds,
        )  # fmt: skip
        self.prefill += [self._failed("twin", task, *one) for one in failed.items()]

    def _failed(self, model: str, task: Task, name: str, reason: str) -> Message:
        way = next(way for way in ways.WAYS if way.name == name)
        return {
            "model": model, "budget_fraction": (task.percent or 0) / 100, "contestant": name,
            "promise": way.promise, "driven": way.driven, "layers": self.facts[model].layers,
            "skipped": reason,
        }  # fmt: skip

    def _seconds(self) -> float:
        return self.budget.left + GRACE

    def _keep(self) -> None:
        """So far, in case that this process is ended."""
        path = self.options.work / "so-far.json"
        path.write_text(json.dumps({"cells": self.cells, "micro": self.figures}), encoding="utf-8")

    def close(self) -> None:
        for shift in self.shifts.values():
            shift.close()

    # ---------------------------------------------------------------------------------- results

    def rates(self) -> Rates:
        """The best seen of each, by whatever reached it: no floor may be beaten."""

        def best(*names: str) -> float | None:
            known = [self.figures.get(name, {}).get("rate") for name in names]
            return max(filter(None, known), default=None)

        return Rates(best("device", "expert bf16"), best("link", "gather"), best("cpu"))

    def results(self) -> Row:
        """Everything, as the last line tells it."""
        rates = self.rates()
        cells = [
            figures.row(_head(raw), _turns(raw), self.facts[raw["model"]], rates)
            for raw in self.cells
        ]
        prefill = [
            figures.prefill_row(_head(raw), _turns(raw), raw.get("once_bytes"), rates)
            for raw in self.prefill
        ]
        judged = (cells, self.figures, prefill) if not self.options.smoke else ([], {}, [])
        found = figures.targets(*judged)  # small models meet or miss nothing
        return {
            "cells": cells,
            "prefill": prefill,
            "micro": list(self.figures.values()),
            "targets": [target.as_dict() for target in found],
            "left_out": [*(f"{k}: {v}" for k, v in self.absent.items()), *self.budget.left_out],
            "models": {name: facts.as_dict() for name, facts in self.facts.items()},
            "seconds": round(self.budget.spent, 1),
        }


def _shift(kind: str) -> str:
    """Whose process does work of this kind."""
    return {"prefill": "twin", "formats": "micro"}.get(kind, kind)


def _head(raw: Message) -> Row:
    return {"skipped": None, **{k: v for k, v in raw.items() if k != "turns"}}


def _turns(raw: Message) -> list[Turn]:
    return [Turn(**turn) for turn in raw.get("turns", ())]


# ---------------------------------------------------------------------------------- on a screen


def text_of(results: Row) -> str:
    """Tables for people: models, cells, prefill, parts, targets, what was left out."""
    parts = [_models(results["models"])]
    if results["cells"]:
        parts.append(show.table(results["cells"], figures.COLUMNS))
    if results["prefill"]:
        parts.append(show.table(results["prefill"], figures.PREFILL_COLUMNS))
    parts.append(_parts(results["micro"]))
    targets = [{**target, "rounds": 1} for target in results["targets"]]
    parts.append(show.table(targets, figures.TARGET_COLUMNS))
    if results["left_out"]:
        parts.append("\n".join(f"left out: {name}" for name in results["left_out"]))
    return "\n\n".join(filter(None, parts))


def _models(found: dict[str, Row]) -> str:
    size = show.size
    return "\n".join(
        f"{name}: {size(f['experts'] * f['expert_bytes'])} of experts, {f['layers']} layers of "
        f"{f['experts'] // f['layers']}, {size(f['expert_bytes'])} each, top {f['top_k']}; "
        f"{f['words']}"
        for name, f in found.items()
    )


def _parts(found: Sequence[Message]) -> str:
    """Memories and kernels alone."""
    known = [{"rounds": 1, **figure} for figure in found if figure["rate"] is not None]
    lines = [show.table(known, figures.MICRO_COLUMNS)] if known else []
    lines += [f"{f['name']}: not measured, {f['skipped']}" for f in found if f["rate"] is None]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ arguments


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trace", type=Path, help="a public route CSV, for qwen3")
    parser.add_argument("--recall", type=float, default=0.9, help="of qwen3, assumed (%(default)s)")
    parser.add_argument("--budget-minutes", type=float, default=8.0, help="(%(default)s)")
    parser.add_argument("--models", help=f"of {', '.join(subjects.NAMES)} (twin,qwen3)")
    parser.add_argument("--rows", help=f"of {', '.join(ways.NAMES)}; default: all")
    parser.add_argument("--only", default="", help="micro, prefill, twin, twin:50, ...")
    parser.add_argument("--budgets", default=",".join(map(str, schedule.BUDGETS)))
    parser.add_argument("--rounds", type=int, default=5, help="counted ones (%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=128, help="of a twin (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=33, help="(%(default)s)")
    parser.add_argument("--long-prompt", type=int, default=2048, help="of prefill (%(default)s)")
    parser.add_argument("--profile", help="of the twin, for Router-PF as published")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... (%(default)s)")
    parser.add_argument("--work", type=Path, help="logs and what is known so far")
    parser.add_argument("--output", type=Path, help="write the JSON there, too")
    parser.add_argument("--smoke", action="store_true", help="small models, on the CPU if need be")
    parser.add_argument("--json", action="store_true", help="print nothing but the last line")
    if "--smoke" in (sys.argv if given is None else given):
        parser.set_defaults(
            rounds=2, prompt_tokens=32, new_tokens=9, long_prompt=64, budgets="50", device="cpu"
        )
    return _checked(parser.parse_args(given))


def _checked(options: argparse.Namespace) -> argparse.Namespace:
    """Lists instead of words; raises `UnderstudyError` for what does not exist."""
    options.models = _names(options.models or "twin,qwen3", subjects.NAMES, "model")
    options.only = [name for name in options.only.split(",") if name]
    try:
        options.budgets = [int(share) for share in options.budgets.split(",")]
    except ValueError:
        raise UnderstudyError(f"--budgets {options.budgets!r}: write 50,25,75,10") from None
    if not all(0 < share < 100 for share in options.budgets) or options.rounds < 1:
        raise UnderstudyError("budgets are percent between 0 and 100, and rounds at least 1")
    ways.chosen(options.rows)
    if options.trace is not None and not options.trace.is_file():
        raise UnderstudyError(f"there is no trace {options.trace}")
    options.work = options.work or native.cache_folder() / "gpu" / "run"
    options.work.mkdir(parents=True, exist_ok=True)
    return options


def _names(text: str, known: Sequence[str], what: str) -> list[str]:
    found = [name.strip() for name in text.split(",") if name.strip()]
    for name in found:
        if name not in known:
            raise UnderstudyError(f"no {what} {name!r}; use {', '.join(known)}")
    return found


def measure(run: Run) -> None:
    """Everything there is time for."""
    options, models = run.options, list(run.options.models)
    if "qwen3" in models and options.trace is None:
        models.remove("qwen3")
        run.absent["qwen3"] = "needs the recorded routing, --trace FILE"
    tasks = schedule.tasks(models, options.budgets, options.only)
    run.start(task.kind for task in tasks)
    for task in tasks:
        if _shift(task.kind) not in run.absent and run.budget.allows(task):
            show.say(f"{run.budget.spent:4.0f} s  {task.name}")
            with run.budget.spending(task):
                run.carry_out(task)


def checked_card(options: argparse.Namespace) -> Row | None:
    """What is here, told to the person who waits; ``None``: too little is."""
    lacks = missing(options.device)
    if lacks:
        show.say(f"missing: {'; '.join(lacks)}")
    if any(what.startswith(("an accelerator", "transformers")) for what in lacks):
        return None
    card = cards.card({}, f"{options.rounds} rounds in turns, between two that are compared")
    card["accelerator"] = accelerator(options.device)
    cards.show(card)
    show.say(f"accelerator: {card['accelerator'] or 'none, a try on the CPU'}")
    return card


def main(given: Sequence[str] | None = None) -> int:
    run = None
    try:
        options = arguments(given)
        run = Run(options, TimeBudget(60 * options.budget_minutes))
        card = checked_card(options)
        if card is None:
            return 2
        measure(run)
        tell(options, {**run.results(), "card": card})
    except UnderstudyError as error:
        show.say(f"error: {error}")
        return 2
    finally:
        if run is not None:
            run.close()
    return 0


def tell(options: argparse.Namespace, results: Row) -> None:
    """Before anything is closed: a device that hangs must not cost the results."""
    if not options.json:
        print(text_of(results))
        print()
    last = json.dumps(results)
    if options.output:
        options.output.write_text(last + "\n", encoding="utf-8")
    print(last, flush=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
