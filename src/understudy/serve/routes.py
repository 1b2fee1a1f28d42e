"""Every address of the API, and what lies behind it.

Knows: methods, paths, which responses a client may meet (`/openapi.json` is made of this).
Does not know: how an answer comes about.
"""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Header, Request, Response

from understudy.serve import shapes
from understudy.serve.asks import conversation_tokens, known_tokens, text_tokens
from understudy.serve.chat import ChatForm
from understudy.serve.completions import CompletionForm
from understudy.serve.errors import ErrorEnvelope, Problem
from understudy.serve.intake import JsonRoute
from understudy.serve.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChat,
    TokenizeRequest,
    TokenizeText,
)
from understudy.serve.served import Served, Stage, served
from understudy.serve.streaming import answer

Model = Annotated[Served, Depends(served)]
WantsExperts = Annotated[
    Literal["0", "1"] | None,
    Header(alias="X-Understudy", description="1: as ``understudy: true`` in the body."),
]

_SAID = {
    400: "The request is wrong; ``param`` says where.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not declared to be JSON.",
    429: "The queue is full; see Retry-After.",
    500: "The engine failed.",
    503: "Loading, shutting down, or stopped.",
    "4XX": "Anything else that is the client's.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a client may be told in place of an answer."""
    told: tuple[int | str, ...] = (*statuses, "4XX")
    return {status: {"model": ErrorEnvelope, "description": _SAID[status]} for status in told}


def streamed(shape: Any) -> dict[int | str, dict[str, Any]]:
    """The two ways in which an answer may come."""
    data = {"type": "string", "description": "A piece of the answer in JSON, or [DONE]."}
    event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
    events = {"text/event-stream": {"schema": event}}
    return {200: {"model": shape, "content": events, "description": "The answer, or its stream."}}


_ASKING = errors(400, 401, 404, 408, 413, 415, 429, 500, 503)
_READING = errors(401, 503)

router = APIRouter(route_class=JsonRoute)


@router.post("/v1/chat/completions", responses={**streamed(shapes.ChatCompletion), **_ASKING})
async def chat_completions(
    request: Request, body: ChatRequest, model: Model, experts: WantsExperts = None
) -> Response:
    """Continue a conversation."""
    wanted = bool(body.understudy) or experts == "1"
    return await answer(
        request, model, lambda: ChatForm(model, body, wanted), stream=bool(body.stream)
    )


@router.post("/v1/completions", responses={**streamed(shapes.Completion), **_ASKING})
async def completions(
    request: Request, body: CompletionRequest, model: Model, experts: WantsExperts = None
) -> Response:
    """Continue texts."""
    wanted = bool(body.understudy) or experts == "1"
    return await answer(
        request, model, lambda: CompletionForm(model, body, wanted), stream=bool(body.stream)
    )


@router.get("/v1/models", responses=_READING)
async def models(model: Model) -> shapes.ModelList:
    """All names of the model."""
    return shapes.ModelList(data=[_card(model, name) for name in model.settings.names])


@router.get("/v1/models/{model_id:path}", responses=errors(401, 404, 503))
async def one_model(model_id: str, model: Model) -> shapes.ModelCard:
    """The model by one of its names."""
    return _card(model, model.name(model_id))


def _card(model: Served, name: str) -> shapes.ModelCard:
    return shapes.ModelCard(id=name, created=model.created, max_model_len=model.batch.context)


@router.post("/tokenize", responses=errors(400, 401, 404, 408, 413, 415, 503))
async def tokenize(body: TokenizeRequest, model: Model) -> shapes.Tokens:
    """Text or a conversation -> token ids."""
    model.name(body.model)
    return await asyncio.to_thread(_tokenized, model, body)


def _tokenized(model: Served, body: TokenizeText | TokenizeChat) -> shapes.Tokens:
    if isinstance(body, TokenizeText):
        tokens = text_tokens(model, body.prompt, body.add_special_tokens)
    else:
        tokens = conversation_tokens(model, body, with_tools=bool(body.tools))
    names = model.tokenizer.convert_ids_to_tokens(list(tokens)) if body.return_token_strs else None
    return shapes.Tokens(
        count=len(tokens),
        max_model_len=model.batch.context,
        tokens=list(tokens),
        token_strs=names,
    )


@router.post("/detokenize", responses=errors(400, 401, 404, 408, 413, 415, 503))
async def detokenize(body: DetokenizeRequest, model: Model) -> shapes.Text:
    """Token ids -> text."""
    model.name(body.model)
    tokens = list(known_tokens(model, body.tokens)) if body.tokens else []
    return shapes.Text(prompt=await asyncio.to_thread(model.tokenizer.decode, tokens))


@router.get("/tokenizer_info", responses=_READING)
async def tokenizer_info(model: Model) -> shapes.TokenizerInfo:
    """What lm-eval needs in order to tokenize through this server."""
    tokenizer = model.tokenizer
    template = model.settings.chat_template or getattr(tokenizer, "chat_template", None)
    return shapes.TokenizerInfo(
        tokenizer_class=type(tokenizer).__name__,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        chat_template=template if isinstance(template, str) else None,
    )


@router.get("/health", responses=errors(503))
@router.get("/ping", responses=errors(503), name="ping")
@router.head("/health", include_in_schema=False)
@router.head("/ping", include_in_schema=False)
async def health(request: Request) -> shapes.Health:
    """200: it answers. 503: it is loading, shutting down, or stopped."""
    stage: Stage = request.app.state.stage
    stage.require_health()
    return shapes.Health()


@router.get("/version", responses=errors())
async def show_version() -> shapes.Version:
    """Of understudy."""
    return shapes.Version(version=version("understudy"))


@router.get("/metrics", response_class=Response, responses=_READING)
async def metrics(request: Request, model: Model) -> Response:
    """For Prometheus."""
    stage: Stage = request.app.state.stage
    if stage.metrics is None:
        raise Problem(404, "this server was started without metrics", code="not_found")
    body = await asyncio.to_thread(stage.metrics.render)
    return Response(body, media_type=stage.metrics.content_type)
