"""The options that several commands share, each written once.

Knows: names, defaults, help texts and environment twins.
Does not know: what an option does; `EngineOptions` is handed to the engine as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from understudy.registry import EVICTORS, ORACLES, PREDICTORS, RESOLVERS, ROUTES, require


def option(*names: str, help: str, **more: Any) -> Any:
    """A typer option with its environment twin: ``--max-context`` is ``UNDERSTUDY_MAX_CONTEXT``."""
    long_name = next(name for name in names if name.startswith("--"))
    twin = "UNDERSTUDY_" + long_name.split("/")[0].strip("-").replace("-", "_").upper()
    return typer.Option(*names, help=help, envvar=twin, show_envvar=False, **more)


_EVICTORS = ", ".join(name for name in EVICTORS.builtin_names if name not in ORACLES)

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A checkpoint folder or a Hugging Face id.")
]
MaxContext = Annotated[
    int | None,
    option(
        "--max-context",
        "--max-model-len",
        "--ctx-size",
        "-c",
        help="Tokens of prompt and answer.",
        metavar="N",
        min=1,
    ),
]
Json = Annotated[bool, option("--json", help="Print the result as one line of JSON.")]


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What `understudy.engine.Engine` can be told from the command line."""

    memory: Annotated[
        str,
        option("--memory", help="8GiB, 512MiB, 50% (of the checkpoint) or auto.", metavar="SIZE"),
    ] = "auto"
    max_context: MaxContext = None
    evictor: Annotated[
        str, option("--evictor", help=f"Who leaves: {_EVICTORS}.", metavar="NAME")
    ] = "lrfu"
    predictor: Annotated[
        str,
        option(
            "--predictor",
            "--prefetch",
            help=f"Who comes early: {', '.join(PREDICTORS.builtin_names)}.",
            metavar="NAME",
        ),
    ] = "next-gate"
    depth: Annotated[
        int, option("--depth", help="Layers to predict ahead.", metavar="N", min=1, max=8)
    ] = 1
    io_threads: Annotated[
        int, option("--io-threads", help="Reading threads.", metavar="N", min=1)
    ] = 4
    prefill_chunk_size: Annotated[
        int,
        option(
            "--prefill-chunk-size",
            "--max-num-batched-tokens",
            help="Prompt tokens per forward.",
            metavar="N",
            min=1,
        ),
    ] = 512
    dtype: Annotated[
        str,
        option("--dtype", help="auto (as stored), bfloat16, float16 or float32.", metavar="NAME"),
    ] = "auto"
    threads: Annotated[
        int | None,
        option("--threads", help="Computing threads; default: torch's.", metavar="N", min=1),
    ] = None
    kernel: Annotated[
        str,
        option(
            "--kernel",
            help="For few tokens: auto (measured), torch, native or native:N; on a device: triton.",
            metavar="NAME",
        ),
    ] = "auto"
    frame: Annotated[
        str,
        option(
            "--frame",
            help="Decoder layers: compiled, eager, or auto (compiled from 0.5e9 parameters on).",
            metavar="NAME",
        ),
    ] = "auto"
    slots: Annotated[
        str | None,
        option(
            "--slots",
            help="Experts held, at most: a number, 50% of all, or 2k for two layers' worth.",
            metavar="N",
        ),
    ] = None
    route: Annotated[
        str,
        option(
            "--route",
            help=f"Who runs: {', '.join(ROUTES.builtin_names)}; all but the first are lossy.",
            metavar="NAME",
        ),
    ] = "as-routed"
    resolver: Annotated[
        str,
        option(
            "--resolver",
            help=f"What a miss does: {', '.join(RESOLVERS.builtin_names)}; all but the first need "
            "a device and may round otherwise.",
            metavar="NAME",
        ),
    ] = "fetch"
    profile: Annotated[
        Path | None,
        option("--profile", help="What was learned about this model offline.", metavar="FILE"),
    ] = None
    device: Annotated[
        str,
        option("--device", help="Where experts are computed: cpu, cuda or cuda:1.", metavar="NAME"),
    ] = "cpu"
    device_memory: Annotated[
        str,
        option(
            "--device-memory",
            help="Of the accelerator: 12GiB, 60% (of the checkpoint) or auto.",
            metavar="SIZE",
        ),
    ] = "auto"
    decode: Annotated[
        str,
        option(
            "--decode",
            help="Who fetches experts between tokens: host, device or auto (measured).",
            metavar="NAME",
        ),
    ] = "auto"
    direct_io: Annotated[
        bool, option("--direct-io/--no-direct-io", help="Read past the page cache.")
    ] = True

    def check_names(self) -> None:
        """Complain about a mistyped policy before anything slow begins."""
        require(self.evictor, self.predictor, self.route, self.resolver)

    def as_arguments(self) -> dict[str, Any]:
        return asdict(self)


def takes_options(**groups: type[Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Replaces a command's parameters of these names by one option per field of their
    dataclasses."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(command)
        def with_options(**given: Any) -> Any:
            for name, group in groups.items():
                told = {field.name: given.pop(field.name) for field in fields(group)}
                given[name] = group(**told)
            return command(**given)

        own = signature(command, eval_str=True)
        kept = [p for p in own.parameters.values() if p.name not in groups]
        added = [parameter for group in groups.values() for parameter in _parameters(group)]
        with_options.__signature__ = own.replace(parameters=[*kept, *added])  # type: ignore[attr-defined]
        return with_options

    return decorate


def _parameters(group: type[Any]) -> Iterator[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        yield Parameter(
            field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )


def takes_engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Replaces a command's parameter ``options`` by one option per field of `EngineOptions`."""

    @wraps(command)
    def checked(*, options: EngineOptions, **given: Any) -> Any:
        options.check_names()
        return command(options=options, **given)

    return takes_options(options=EngineOptions)(checked)
