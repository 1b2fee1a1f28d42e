"""Opens a batching engine: loads the model for many sequences, and finds seats that suit it.

Knows: the kinds of seats, what loading needs to know of serving. Does not know: HTTP.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from understudy.anatomy import Anatomy
from understudy.batch import Seats
from understudy.batch.engine import BatchEngine
from understudy.batch.fibers import Fibers
from understudy.batch.paged import Paged, Unpaged
from understudy.core import UnderstudyError
from understudy.engine import Engine

BATCHINGS = ("auto", "paged", "fibers")
FEWEST_TOKENS = 32  # of a step: fewer would read a prompt's experts again and again


def start(
    source: str | Path | Anatomy,
    *,
    max_num_seqs: int = 32,
    max_num_batched_tokens: int = 512,
    max_queue: int = 256,
    batching: str = "auto",
    on_status: Callable[[str], None] | None = None,
    **options: Any,
) -> BatchEngine:
    """Load ``source`` and begin to take asks. ``options``: those of `understudy.Engine`.

    ``batching``: ``paged`` (one packed forward over transformers' paged cache), ``fibers`` (a
    forward each, parked at the experts), ``auto``: paged where the family allows it.
    """
    if batching not in BATCHINGS:
        raise UnderstudyError(f"unknown batching {batching!r}; use {', '.join(BATCHINGS)}")
    if max_num_batched_tokens < FEWEST_TOKENS:
        raise UnderstudyError(
            f"--max-num-batched-tokens must be at least {FEWEST_TOKENS}, not "
            f"{max_num_batched_tokens}"
        )
    if batching != "fibers":
        if options.get("frame", "auto") == "compiled":
            raise UnderstudyError(
                "only --batching fibers can run compiled layers; use it, or --frame eager"
            )
        options["frame"] = "eager"
    options |= {
        "sequences": max_num_seqs,
        "prefill_chunk_size": max_num_batched_tokens,
    }
    say = on_status or (lambda line: None)
    engine = Engine(source, on_status=on_status, **options)
    try:
        seats = _seats(engine, batching, max_num_seqs, max_num_batched_tokens, say)
        return BatchEngine(
            engine,
            seats,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_queue=max_queue,
        )
    except BaseException:
        engine.close()
        raise


def _seats(
    engine: Engine, batching: str, rows: int, tokens: int, say: Callable[[str], None]
) -> Seats:
    plan, model = engine.plan, engine.model
    if batching != "fibers":
        try:
            return Paged(model, capacity=plan.kv_tokens, max_rows=rows, max_batch_tokens=tokens)
        except Unpaged as e:
            if batching == "paged":
                raise
            say(f"note: a forward for each sequence, {e}")
    return Fibers(model, capacity=plan.kv_tokens, row_tokens=plan.kv_row_tokens)
