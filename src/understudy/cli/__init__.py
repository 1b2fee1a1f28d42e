"""The command line: ``understudy run``, ``chat``, ``bench``, ``pack``, ``profile``, ...

Knows: the commands, and how each way of ending becomes an exit code: 0 done, 1 the answer is no,
2 the user can cure it (one line says how), 130 interrupted.
Does not know: what a command does. Each module beside this one holds one group of commands.

Nothing heavy is imported before a command runs: ``--help`` and typing errors answer at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from understudy.cli import (
    bench_serve,
    compare,
    doctor,
    evaluate,
    look,
    measure,
    pack,
    profile,
    screen,
    serve,
    simulate,
    talk,
    trace,
)
from understudy.core import UnderstudyError

DONE, CURABLE, INTERRUPTED = 0, 2, 130

# Depending on its version typer imports click or brings a copy: ask typer for the class.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class Commands(TyperGroup):
    """A command's name may be two words, of which the first alone is another command."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        two = " ".join(args[:2])
        if len(args) > 1 and two in self.commands:
            return two, self.commands[two], args[2:]
        return super().resolve_command(ctx, args)


app = typer.Typer(
    name="understudy",
    cls=Commands,
    help="Runs Mixture-of-Experts language models that are larger than the memory they are given.",
    epilog="Every option has an environment twin: --max-context is UNDERSTUDY_MAX_CONTEXT.",
    rich_markup_mode=None,  # plain help: its columns are narrow enough for names in full
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        screen.write(f"understudy {version('understudy')}\n")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def understudy(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print it and leave."
        ),
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        screen.write(context.get_help() + "\n")


for command in (
    measure.demo,
    talk.run,
    talk.chat,
    serve.serve,
    measure.bench,
    look.inspect,
    pack.pack,
    trace.trace,
    simulate.simulate,
    profile.profile,
    compare.compare,
    doctor.doctor,
    look.families,
):
    app.command()(command)
app.command("eval")(evaluate.evaluate)
app.command("bench serve")(bench_serve.bench_serve)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """The ``understudy`` program."""
    code = _run(sys.argv[1:] if arguments is None else arguments)
    if code == INTERRUPTED:
        screen.leave_at_once(code)
    sys.exit(code)


def _run(arguments: Sequence[str]) -> int:
    try:
        code = app(list(arguments), prog_name="understudy", standalone_mode=False)
        sys.stdout.flush()  # here, where a reader that has gone can still be met in silence
        return code if isinstance(code, int) else DONE
    except UnderstudyError as error:
        screen.complain(str(error))
        return CURABLE
    except UsageError as error:
        screen.complain(_usage(error))
        return CURABLE
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        screen.silence()
        return DONE


def _usage(error: Exception) -> str:
    """A mistyped command line in one line, with the place to read on."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "understudy"
    reason = error.format_message() if hasattr(error, "format_message") else str(error)
    return f"{reason.rstrip('.').replace(chr(10), ' ')}; see {command} --help"
