"""``understudy serve``: a model behind OpenAI's API.

Knows: the server's options, under vLLM's names and llama.cpp's. Does not know: HTTP.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from understudy.cli import screen
from understudy.cli.options import EngineOptions, Model, option, takes_engine_options
from understudy.cli.session import quiet_guests
from understudy.core import UnderstudyError

if TYPE_CHECKING:
    from understudy.serve.served import Batch
    from understudy.serve.settings import Settings

LOOPBACK = ("127.0.0.1", "::1", "localhost")

Host = Annotated[str, option("--host", help="Address to listen on.", metavar="ADDRESS")]
Port = Annotated[int, option("--port", help="0: any that is free.", metavar="N", min=0, max=65535)]
Names = Annotated[
    list[str] | None,
    option("--served-model-name", help="What clients call it; repeatable.", metavar="NAME"),
]
ApiKey = Annotated[str | None, option("--api-key", help="Clients must know it.", metavar="KEY")]
Sequences = Annotated[
    int,
    option("--max-num-seqs", "--parallel", "-np", help="Answers at once.", metavar="N", min=1),
]
Queue = Annotated[
    int, option("--max-queue", help="Requests that may wait; then 429.", metavar="N", min=0)
]
KvMemory = Annotated[
    str,
    option("--kv-memory", help="Of the budget, for KV caches: 2GiB or auto.", metavar="SIZE"),
]
Batching = Annotated[str, option("--batching", help="auto, paged or fibers.", metavar="NAME")]
Template = Annotated[
    Path | None,
    option("--chat-template", help="In place of the model's own.", metavar="FILE"),
]
ToolParser = Annotated[
    str,
    option(
        "--tool-call-parser",
        help="How it writes tool calls: auto, hermes, json or mistral.",
        metavar="NAME",
    ),
]
Origins = Annotated[
    list[str] | None,
    option(
        "--allowed-origins",
        help="Web pages that may ask, or *; repeatable. Default: none.",
        metavar="ORIGIN",
    ),
]
DrainTimeout = Annotated[
    float,
    option("--drain-timeout", help="Seconds to finish after SIGTERM.", metavar="S", min=0.0),
]
RequestTimeout = Annotated[
    float | None,
    option(
        "--request-timeout",
        help="Seconds a whole answer may take; default: any.",
        metavar="S",
        min=0.001,
    ),
]
WriteTimeout = Annotated[
    float,
    option("--write-timeout", help="Seconds a client may not read.", metavar="S", min=0.001),
]
BodySize = Annotated[str, option("--max-body-size", help="Of a request.", metavar="SIZE")]
AccessLog = Annotated[
    bool,
    option("--access-log/--disable-access-log", help="A line for every request."),
]

Page = Annotated[bool, option("--page/--no-page", help="The page at /.")]
Traces = Annotated[
    str | None,
    option(
        "--otlp-traces-endpoint",
        help="An OpenTelemetry collector: http://localhost:4318.",
        metavar="URL",
    ),
]


@takes_engine_options
def serve(
    model: Model,
    *,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    served_model_name: Names = None,
    api_key: ApiKey = None,
    max_num_seqs: Sequences = 32,
    max_queue: Queue = 256,
    kv_memory: KvMemory = "auto",
    batching: Batching = "auto",
    chat_template: Template = None,
    tool_call_parser: ToolParser = "auto",
    allowed_origins: Origins = None,
    drain_timeout: DrainTimeout = 30.0,
    request_timeout: RequestTimeout = None,
    write_timeout: WriteTimeout = 30.0,
    max_body_size: BodySize = "8MiB",
    access_log: AccessLog = True,
    page: Page = True,
    otlp_traces_endpoint: Traces = None,
    options: EngineOptions,
) -> None:
    """Serve a model through OpenAI's API."""
    from understudy.serve import run
    from understudy.serve.settings import Settings, name_of

    settings = Settings(
        model=model,
        names=checked_names(served_model_name or [name_of(model)]),
        host=host,
        port=port,
        api_key=checked_key(api_key),
        allowed_origins=tuple(allowed_origins or ()),
        chat_template=template_in(chat_template),
        tool_call_parser=tool_call_parser,
        max_body_size=checked_size(max_body_size),
        write_timeout=write_timeout,
        request_timeout=request_timeout,
        drain_timeout=drain_timeout,
        access_log=access_log,
        page=page,
        traces_endpoint=otlp_traces_endpoint,
    )
    listener = run.listen(host, port)
    warn_of_strangers(settings)
    run.log_to_stderr(access_log)
    screen.say(f"loading {settings.names[0]} ...")
    batch_options = {
        **options.as_arguments(),
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": options.prefill_chunk_size,
        "max_queue": max_queue,
        "kv_memory": kv_memory,
        "batching": batching,
    }

    def start(say: run.Say) -> Batch:
        quiet_guests()
        return run.start_engine(settings, batch_options, say)

    if not run.serve(settings, start, screen.say, listener):
        raise KeyboardInterrupt


def checked_names(names: list[str]) -> tuple[str, ...]:
    if not all(name.strip() for name in names):
        raise UnderstudyError("--served-model-name is empty; leave it out or say a name")
    return tuple(names)


def checked_size(text: str) -> int:
    """Bytes; a share of something, or what is free, is no size of a request."""
    from understudy.plan import parse_memory

    if text.strip().lower() == "auto" or "%" in text:
        raise UnderstudyError(f"--max-body-size cannot be {text!r}; write 8MiB, or bytes")
    return parse_memory(text, 0)


def checked_key(key: str | None) -> str | None:
    if key is not None and not key.strip():
        raise UnderstudyError(
            "--api-key is empty: anybody could guess it; leave it out or name one"
        )
    return key and key.strip()


def template_in(file: Path | None) -> str | None:
    """The template's text. One that cannot be read or parsed is refused now, not by every chat."""
    if file is None:
        return None
    from jinja2 import Environment, TemplateSyntaxError

    try:
        text = file.read_text(encoding="utf-8")
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except OSError as error:
        raise UnderstudyError(f"cannot read {file}: {error.strerror}") from error
    except (UnicodeDecodeError, TemplateSyntaxError) as error:
        raise UnderstudyError(f"{file} is not a chat template in Jinja: {error}") from error
    return text


def warn_of_strangers(settings: Settings) -> None:
    """Once, on the way to a network."""
    if settings.host not in LOOPBACK and settings.api_key is None:
        screen.say(
            f"warning: everybody who reaches {settings.host} can use this server; set --api-key"
        )
