"""What the operator of the server has chosen, and the bounds that nobody can exceed.

Knows: numbers and their reasons. Does not know: who enforces them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20

# Bounds that a request meets whatever the model. OpenAI's where OpenAI has one.
MAX_JSON_DEPTH = 64
MAX_JSON_KEYS = 4096  # of one object; every wrong one is described before the first is told
MAX_ANSWERS = 128  # n times prompts
MAX_MESSAGES = 4096
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_LENGTH = 512
MAX_STOP_TOKENS = 128
MAX_LOGIT_BIAS = 1024
MAX_TOOLS = 128
MAX_SCHEMA_DEPTH = 32
MAX_SCHEMA_BYTES = 64 << 10
MAX_NAME = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """``model``: as it was given on the command line; ``names``: what clients call it, the first
    one is shown. ``request_timeout``: seconds a whole answer may take, ``None``: any."""

    model: str
    names: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    allowed_origins: tuple[str, ...] = ()
    chat_template: str | None = None  # in place of the model's own
    tool_call_parser: str = "auto"
    max_body_size: int = 8 * MIB
    body_timeout: float = 30.0  # for a whole request to arrive
    write_timeout: float = 30.0  # for a client to take what lies ready for it
    request_timeout: float | None = None
    drain_timeout: float = 30.0
    keep_alive: float = 15.0  # between two requests of a connection
    heartbeat: float = 5.0  # of a silent stream; also how often a silent engine is looked at
    backlog: int = 4096  # steps that a reader may lag behind
    access_log: bool = True
    page: bool = True
    traces_endpoint: str | None = None  # of an OpenTelemetry collector


def name_of(model: str) -> str:
    """What clients call a model: a Hugging Face id as it is, a folder by its own name, because
    where it lies is nobody's business."""
    path = Path(model)
    return (path.resolve().name or model) if path.is_dir() else model
