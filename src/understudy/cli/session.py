"""Opens an engine for a command: guests silenced, a spinner while it loads, the plan on stderr.

Knows: who else likes to talk on a terminal (transformers, huggingface_hub, Python's warnings).
Does not know: what the command does with the engine.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from understudy.cli import screen
from understudy.cli.options import EngineOptions

if TYPE_CHECKING:
    from understudy.engine import Engine


def quiet_guests() -> None:
    """Keep other people's bars and warnings off the screen; downloads may still show theirs."""
    if not sys.warnoptions:  # `python -W ...` asks for warnings
        warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    enable_progress_bars()  # transformers switched these off with its own


@contextmanager
def opened(model: str, options: EngineOptions) -> Iterator[Engine]:
    """The engine for ``model``, closed when the block ends."""
    with screen.waiting(f"loading {model}") as status:
        quiet_guests()
        from understudy.engine import Engine

        engine = Engine(model, **options.as_arguments(), on_status=status)
    with engine:
        screen.say(engine.plan.line())
        yield engine
