"""What people see: text and results on stdout, everything else on stderr.

Knows: terminals, pipes, colours (``NO_COLOR`` is honoured by rich), progress bars.
Does not know: what is shown. Nothing here imports the engine.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

PIPE_WIDTH = 140  # a table in a pipe or a log is not cut to the width of a screen it never meets

Report = Callable[[int, int], None]  # (done, in all)


def console(stderr: bool = False) -> Console:
    """A console on the stream as it is now (tests and pipes exchange them)."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else PIPE_WIDTH)


def write(text: str) -> None:
    """Text for stdout, shown at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def write_beside(text: str) -> None:
    """Text that would be on stdout if stdout were not for JSON."""
    sys.stderr.write(text)
    sys.stderr.flush()


def write_json(result: dict[str, Any]) -> None:
    """The one line of ``--json``, always the last on stdout."""
    write(json.dumps(result) + "\n")


def tell(text: str) -> None:
    """A line that belongs to the result."""
    console().print(text, markup=False, soft_wrap=True)


def say(text: str) -> None:
    """A line beside the result, such as the plan."""
    console(stderr=True).print(text, style="dim", markup=False, soft_wrap=True)


def complain(text: str) -> None:
    """The one line of an error."""
    line = " ".join(text.split())
    console(stderr=True).print("[red]error:[/red]", end=" ", soft_wrap=True)
    console(stderr=True).print(line, markup=False, soft_wrap=True)


def silence() -> None:
    """Nobody reads stdout any more: let Python's last flush go nowhere instead of failing."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def leave_at_once(code: int) -> NoReturn:
    """End without Python's farewell: taking torch apart can last longer than a person who pressed
    Ctrl-C wants to wait. Everything that has to be closed was closed on the way here."""
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def show(table: Table, json_too: bool = False) -> None:
    """A table on stdout, or on stderr where stdout is for JSON.

    It keeps its natural width: a narrow terminal wraps its lines, which is better than numbers cut
    in half.
    """
    screen = console(stderr=json_too)
    natural = screen.measure(table, options=screen.options.update(width=PIPE_WIDTH)).maximum
    if natural > screen.width and not any(column.overflow == "fold" for column in table.columns):
        screen.width = natural
    screen.print(table)


def grid(*columns: str, title: str | None = None) -> Table:
    """An empty table: first column left, all others right, as numbers want it."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    return table


def facts(rows: dict[str, str], title: str | None = None) -> Table:
    """Names and values, one pair a line."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    table.show_header = False
    return table


@contextmanager
def waiting(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner while something takes its time; the yielded function changes its text."""
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield lambda text: None
        return
    with screen.status(text) as spinner:
        yield lambda text: spinner.update(text)


@contextmanager
def progress() -> Iterator[Callable[[str], Report]]:
    """Bars: ``bar("reading")`` gives the function that is told (done, in all).

    Without a terminal each bar is a single line that says what has begun.
    """
    screen = console(stderr=True)
    if not screen.is_terminal:
        yield _announce
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
    )
    with Progress(*columns, TimeRemainingColumn(), console=screen, transient=True) as bars:

        def bar(label: str) -> Report:
            return _updater(bars, bars.add_task(label, total=None))

        yield bar


def _announce(label: str) -> Report:
    say(f"{label} ...")
    return lambda done, total: None


def _updater(bars: Progress, task: TaskID) -> Report:
    def report(done: int, total: int) -> None:
        bars.update(task, completed=done, total=total, visible=done < total)

    return report
