"""From the fields of a request to an `Ask`: prompts as token ids, sampling, lengths.

Knows: chat templates and tokenizers by their calls, the model's context. Does not know: HTTP, what
becomes of an answer. Everything here may take a while and runs in a thread.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from jinja2 import TemplateError

from understudy.batch import Ask, Grammar, Sampling
from understudy.batch.tools import Named
from understudy.core import UnderstudyError
from understudy.serve.errors import Problem, invalid, require
from understudy.serve.protocol import (
    ChatRequest,
    Conversation,
    FromAssistant,
    Generation,
    NamedTool,
)
from understudy.serve.served import Served

SEEDS = 1 << 63

# How a template fails at messages that it was not made for: as any program does.
TEMPLATE_FAILS = (
    TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError,
    RecursionError,
)  # fmt: skip

# --------------------------------------------------------------------------------------- prompts


def text_tokens(served: Served, text: str, add_special_tokens: bool | None) -> tuple[int, ...]:
    """Plain text -> token ids."""
    require_short(served, text)
    special = add_special_tokens is not False
    encoded = served.tokenizer(text, add_special_tokens=special, return_attention_mask=False)
    return tuple(encoded["input_ids"])


def require_short(served: Served, *texts: str) -> None:
    """Refuse what no tokenizer could squeeze into the context, before one tries to."""
    if sum(map(len, texts)) > served.most_characters:
        raise too_long("far too many", served)


def too_long(tokens: int | str, served: Served) -> Problem:
    return invalid(
        f"the prompt has {tokens} tokens, more than the context of {served.batch.context}",
        "prompt",
        "context_length_exceeded",
    )


def known_tokens(served: Served, tokens: list[int]) -> tuple[int, ...]:
    """Token ids as they came, if the model has them."""
    if len(tokens) > served.batch.context:
        raise too_long(len(tokens), served)
    size = served.batch.vocab_size
    require(
        min(tokens) >= 0 and max(tokens) < size, f"token ids must be from 0 to {size - 1}", "prompt"
    )
    return tuple(tokens)


def conversation_tokens(served: Served, body: Conversation, with_tools: bool) -> tuple[int, ...]:
    """A conversation -> token ids, through the chat template."""
    require_short(served, *texts_of(body, with_tools))
    template = served.settings.chat_template
    if not (template or getattr(served.tokenizer, "chat_template", None)):
        raise invalid(
            "this model has no chat template; use /v1/completions, or start the server with "
            "--chat-template FILE",
            "messages",
        )
    arguments = template_arguments(served.tokenizer, body)
    if template:
        arguments["chat_template"] = template
    messages = [as_message(message.model_dump(exclude_none=True)) for message in body.messages]
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()] if with_tools else []
    try:
        return tuple(served.tools.render(served.tokenizer, messages, tools, **arguments))
    except UnderstudyError:
        raise
    except TEMPLATE_FAILS as error:
        # The template is a program of the model's makers; what it says is all there is to know.
        reason = " ".join(str(error).split())[:200]
        raise invalid(f"the chat template refuses these messages: {reason}", "messages") from error


def texts_of(body: Conversation, with_tools: bool) -> Iterator[str]:
    """What a template shows of a conversation, whichever it is."""
    for message in body.messages:
        yield message.content or ""
        calls = message.tool_calls if isinstance(message, FromAssistant) else None
        yield from (call.function.arguments for call in calls or ())
    for tool in (body.tools or ()) if with_tools else ():
        yield json.dumps(tool.function.model_dump(exclude_none=True))


def template_arguments(tokenizer: Any, body: Conversation) -> dict[str, Any]:
    """What the template is told. Names of `apply_chat_template` itself are not for clients: one of
    them would replace the template, a program, by another."""
    own = set(inspect.signature(tokenizer.apply_chat_template).parameters) | {"messages", "tools"}
    given = dict(body.chat_template_kwargs or {})
    taken = sorted(own & set(given))
    require(not taken, f"{', '.join(taken)} cannot be set here", "chat_template_kwargs")
    continued = bool(body.continue_final_message)
    generation = body.add_generation_prompt
    return given | {
        "continue_final_message": continued,
        "add_generation_prompt": not continued if generation is None else generation,
    }


def as_message(message: dict[str, Any]) -> dict[str, Any]:
    """A developer is OpenAI's newer word for the system; templates know the older one."""
    if message["role"] == "developer":
        message["role"] = "system"
    return message


# ----------------------------------------------------------------------------------- structure


def grammar_of(served: Served, body: ChatRequest) -> Grammar | None:
    """What holds an answer to its form, if the request wants one."""
    try:
        return _tool_grammar(served, body) if uses_tools(body) else _format_grammar(served, body)
    except UnderstudyError as error:
        param = "tools" if uses_tools(body) else "response_format"
        raise invalid(str(error), param) from error


def uses_tools(body: ChatRequest) -> bool:
    return bool(body.tools) and body.tool_choice != "none"


def _tool_grammar(served: Served, body: ChatRequest) -> Grammar | None:
    choice = body.tool_choice or "auto"
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
    return served.tools.grammar(
        served.grammars,
        tools,
        Named(choice.name) if isinstance(choice, NamedTool) else choice,
        parallel=body.parallel_tool_calls is not False,
    )


def _format_grammar(served: Served, body: ChatRequest) -> Grammar | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if wanted.json_schema is None:
        return served.grammars.json_object()
    return served.grammars.json_schema(wanted.json_schema.schema_)


# ----------------------------------------------------------------------------------------- asks


def ask_of(
    served: Served,
    body: Generation,
    prompt: tuple[int, ...],
    *,
    new_tokens: int | None,
    param: str,
    **more: Any,
) -> Ask:
    """``new_tokens``: at most, ``None``: what fits. ``param``: where the prompt came from."""
    room = served.batch.context - len(prompt)
    require(len(prompt) > 0, "the prompt is empty; write something", param)
    if room < (1 if new_tokens is None else new_tokens):
        wanted = f" and {new_tokens} new ones" if new_tokens else ""
        raise invalid(
            f"{len(prompt)} prompt tokens{wanted} exceed the context of {served.batch.context}; "
            "shorten the prompt or ask for fewer tokens",
            param,
            "context_length_exceeded",
        )
    most = room if new_tokens is None else new_tokens
    least = body.min_tokens or 0
    require(least <= most, f"min_tokens is more than the {most} that may come", "min_tokens")
    return Ask(
        prompt=prompt,
        max_new_tokens=most,
        sampling=sampling_of(served, body),
        stop=tuple(body.stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        include_stop=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
        min_tokens=least,
        **more,
    )


def sampling_of(served: Served, body: Generation) -> Sampling:
    """OpenAI's defaults where nothing is said."""
    size = served.batch.vocab_size
    bias = body.logit_bias or {}
    require(
        all(token < size for token in bias),
        f"logit_bias: token ids end at {size - 1}",
        "logit_bias",
    )

    def said(value: float | None, default: float) -> float:
        return default if value is None else value

    return Sampling(
        temperature=said(body.temperature, 1.0),
        top_p=said(body.top_p, 1.0),
        top_k=max(0, body.top_k or 0),
        min_p=said(body.min_p, 0.0),
        repetition_penalty=said(body.repetition_penalty, 1.0),
        presence_penalty=said(body.presence_penalty, 0.0),
        frequency_penalty=said(body.frequency_penalty, 0.0),
        logit_bias=bias,
        seed=body.seed,
    )


def several(ask: Ask, n: int) -> Iterator[Ask]:
    """``n`` answers to one prompt; each has a seed of its own that follows from the one given."""
    yield ask
    seed = ask.sampling.seed
    for number in range(1, n):
        own = None if seed is None else (seed + number + SEEDS) % (2 * SEEDS) - SEEDS
        yield replace(ask, sampling=replace(ask.sampling, seed=own))
