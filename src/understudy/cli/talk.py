"""The commands that talk: ``run`` continues a prompt, ``chat`` holds a conversation.

Knows: where a prompt comes from and where text goes.
Does not know: how a token is made.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from understudy.cli import screen
from understudy.cli.options import EngineOptions, Json, Model, option, takes_engine_options
from understudy.cli.session import opened
from understudy.core import ContextTooLong, Counters, UnderstudyError

if TYPE_CHECKING:
    from understudy.engine import Engine, Generation

NewTokens = Annotated[
    int, option("--max-new-tokens", "-n", help="Tokens at most.", metavar="N", min=1)
]
Temperature = Annotated[float, option("--temperature", help="0 is greedy.", metavar="X", min=0.0)]
TopP = Annotated[
    float, option("--top-p", help="Sample from this share.", metavar="X", min=0.0, max=1.0)
]
Seed = Annotated[int | None, option("--seed", help="Makes sampling repeat itself.", metavar="N")]
Stop = Annotated[
    list[str] | None, option("--stop", help="Stop before this text; repeatable.", metavar="TEXT")
]
Stats = Annotated[bool, option("--stats", help="Print what happened: times, hits, misses, bytes.")]
File = Annotated[
    Path | None, option("--file", "-f", help="Read the prompt from a file.", metavar="FILE")
]
Prompt = Annotated[
    str | None, typer.Argument(metavar="PROMPT", help="Without it: --file, or standard input.")
]


@takes_engine_options
def run(
    model: Model,
    prompt: Prompt = None,
    *,
    file: File = None,
    max_new_tokens: NewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    stats: Stats = False,
    json: Json = False,
    options: EngineOptions,
) -> None:
    """Continue a prompt."""
    text = find_prompt(prompt, file)
    asked = Sampling(max_new_tokens, temperature, top_p, seed, tuple(stop or ()))
    with opened(model, options) as engine:
        generation = asked.generate(engine, text, stream=not json)
        if stats:
            screen.show(statistics(generation), json_too=True)
        if json:
            screen.write_json(as_result(model, engine, generation))


@takes_engine_options
def chat(
    model: Model,
    *,
    system: Annotated[
        str | None, option("--system", help="What the model is told first.", metavar="TEXT")
    ] = None,
    max_new_tokens: NewTokens = 512,
    temperature: Temperature = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = None,
    stop: Stop = None,
    stats: Stats = False,
    options: EngineOptions,
) -> None:
    """Talk with a model through its chat template. /clear starts afresh, /exit or Ctrl-D leaves."""
    asked = Sampling(max_new_tokens, temperature, top_p, seed, tuple(stop or ()))
    with opened(model, options) as engine:
        require_chat_template(model, engine)
        first = [{"role": "system", "content": system}] if system else []
        messages = list(first)
        for line in lines_typed():
            if line == "/clear":
                messages = list(first)
                continue
            messages = converse(
                engine, asked, [*messages, {"role": "user", "content": line}], stats
            )


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen, and when to stop."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stop: tuple[str, ...]

    def generate(self, engine: Engine, prompt: Any, stream: bool = True) -> Generation:
        generation = engine.generate(
            prompt,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=self.stop,
            on_text=screen.write if stream else None,
        )
        if stream and not generation.text.endswith("\n"):
            screen.write("\n")
        return generation


def find_prompt(prompt: str | None, file: Path | None) -> str:
    """The argument, else the file, else standard input. A file's last newline is not meant."""
    if prompt is not None and file is not None:
        raise UnderstudyError("two prompts: give either the argument or --file, not both")
    if file is not None:
        text = read_file(file)
    elif prompt in (None, "-"):
        if sys.stdin.isatty():
            raise UnderstudyError('no prompt: understudy run MODEL "Once upon a time", or --file')
        text = sys.stdin.read().removesuffix("\n")
    else:
        text = str(prompt)
    if not text:
        raise UnderstudyError("the prompt is empty; there is nothing to continue")
    return text


def read_file(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8").removesuffix("\n")
    except OSError as error:
        raise UnderstudyError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UnderstudyError(f"{file} is not a text file in UTF-8") from error


def require_chat_template(model: str, engine: Engine) -> None:
    if not getattr(engine.tokenizer, "chat_template", None):
        raise UnderstudyError(
            f"{model} has no chat template; continue a text with: understudy run {model} PROMPT"
        )


def lines_typed() -> Iterator[str]:
    """What the user says, until Ctrl-D or /exit; empty lines are not said."""
    asking = sys.stdin.isatty()
    if asking:
        with suppress(ImportError):
            import readline  # noqa: F401  (gives `input` arrow keys and a history)
    while True:
        try:
            line = input("> ") if asking else next(sys.stdin).rstrip("\n")
        except (EOFError, StopIteration):
            return
        if line.strip() == "/exit":
            return
        if line.strip():
            yield line.strip()


def converse(
    engine: Engine, asked: Sampling, messages: list[dict[str, str]], stats: bool
) -> list[dict[str, str]]:
    """One answer; gives back the longer conversation, or the old one if it would be too long."""
    try:
        generation = asked.generate(engine, messages)
    except ContextTooLong as error:
        if len(messages) == 1:
            raise
        screen.complain(f"{error}; /clear starts afresh")
        return messages[:-1]
    if stats:
        screen.show(statistics(generation), json_too=True)
    return [*messages, {"role": "assistant", "content": generation.text}]


def statistics(generation: Generation) -> Any:
    """The table of ``--stats``."""
    from understudy.plan import shown_size

    counters, decode = generation.counters, generation.decode_counters
    lookups = max(1, counters.lookups)
    later = max(1, len(generation.tokens) - 1)
    rows = {
        "prompt": f"{generation.prompt_tokens} tokens, first answer after {generation.ttft:.2f} s",
        "answer": f"{len(generation.tokens)} tokens, {1000 * generation.tpot:.1f} ms each",
        "experts": f"{counters.hits} hits ({100 * counters.hits / lookups:.0f} %), "
        f"{counters.late} late, {counters.misses} misses{_in_place(counters)}, "
        f"{counters.evictions} evictions",
        "bytes read": f"{shown_size(counters.bytes_read)}, of that speculation "
        f"{shown_size(counters.prefetch_bytes)} ({shown_size(counters.wasted_bytes)} wasted); "
        f"{shown_size(decode.bytes_read / later)} per token",
        "speculation": f"{counters.prefetch_issued} reads, {counters.prefetch_used} used, "
        f"{counters.prefetch_wasted} wasted, {counters.prefetch_cancelled} cancelled",
        "stall": f"{counters.stall_seconds:.2f} s waiting for experts; "
        f"{1000 * decode.stall_seconds / later:.1f} ms per token",
    }
    return screen.facts(rows)


def _in_place(counters: Counters) -> str:
    count = counters.computed_in_place
    return f" ({count} computed in place)" if count else ""


def as_result(model: str, engine: Engine, generation: Generation) -> dict[str, Any]:
    """The line of ``run --json``."""
    return {
        "model": model,
        "text": generation.text,
        "tokens": len(generation.tokens),
        "prompt_tokens": generation.prompt_tokens,
        "finish": generation.finish,
        "ttft_ms": round(1000 * generation.ttft, 3),
        "tpot_ms": round(1000 * generation.tpot, 3),
        "counters": generation.counters.as_dict(),
        "plan": engine.plan.as_dict(),
    }
