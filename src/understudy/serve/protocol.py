"""What may be asked: the bodies of requests, field by field, with their bounds.

Knows: OpenAI's fields, vLLM's additions that people rely on, and which of OpenAI's this server does
not have. Does not know: the model; what depends on it (context, vocabulary) is checked later.

Types are strict (true is no number, 1.0 no integer) and no field is ignored. A field that this
server lacks is refused by name, unless its value asks for nothing: ``best_of: 1``. ``null``
everywhere means the default, because clients send it for what they were not told. ``user``,
``metadata``, ``safety_identifier`` and ``prompt_cache_key`` are labels, by OpenAI's own definition
without effect on the answer: they are accepted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_plain_validator_function

from understudy.serve import settings as bounds

# ------------------------------------------------------------------------------------ small types


@dataclass(frozen=True, eq=False)
class Checked:
    """A type with a check of its own. It stops at the first mistake: a union of lists would
    describe each of a million wrong elements three times."""

    check: Callable[[Any], Any]
    schema: dict[str, Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return no_info_plain_validator_function(self.check)

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return self.schema


def only(*neutral: Any) -> Checked:
    """Of a field that this server does not have: only ``null`` and ``neutral`` may be said."""

    def check(value: Any) -> Any:
        if value is None or any(type(value) is type(v) and value == v for v in neutral):
            return value
        raise PydanticCustomError("unsupported", "is not supported")

    description = "Not supported: only what asks for nothing."
    return Checked(check, {"enum": [None, *neutral], "description": description})


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > bounds.MAX_STOPS:
        raise ValueError(f"must be a string or a list of at most {bounds.MAX_STOPS} strings")
    for stop in stops:
        if not isinstance(stop, str) or not 0 < len(stop) <= bounds.MAX_STOP_LENGTH:
            raise ValueError(f"a stop string has 1 to {bounds.MAX_STOP_LENGTH} characters")
    return stops


def _prompts(value: Any) -> list[str | list[int]]:
    """All four forms as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if _are_tokens(value):
            return [value]
        if len(value) > bounds.MAX_ANSWERS:
            raise ValueError(f"at most {bounds.MAX_ANSWERS} prompts fit into one request")
        if all(isinstance(v, str) for v in value):
            return value
        if all(isinstance(v, list) and v and _are_tokens(v) for v in value):
            return value
    raise ValueError(
        "must be a string, a list of strings, a list of token ids, or a list of such lists"
    )


def _are_tokens(value: list[Any]) -> bool:
    return set(map(type, value)) == {int}


def _bias(value: Any) -> dict[int, float]:
    if not isinstance(value, dict) or len(value) > bounds.MAX_LOGIT_BIAS:
        raise ValueError(f"must be an object of at most {bounds.MAX_LOGIT_BIAS} entries")
    made = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise ValueError(f"{key[:40]!a} is not a token id")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise ValueError(f"the bias of token {key} must be a number from -100 to 100")
        made[int(key)] = float(bias)
    return made


def _content(value: Any) -> str:
    """Text, or parts that are all text, one below the other."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of text parts")
    return "\n".join(_texts(value))


def _texts(parts: list[Any]) -> Iterator[str]:
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise ValueError("a part of it must be an object with a type")
        if kind != "text":
            raise ValueError(f"parts of type {kind[:40]!a} are not supported: the model reads text")
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise ValueError("a text part must have the fields type and text, and no others")
        yield part["text"]


def _schema(value: Any) -> dict[str, Any]:
    """A JSON schema that is worth compiling; whether it is one, the compiler knows."""
    if not isinstance(value, dict):
        raise ValueError("must be a JSON schema, which is an object")
    if len(json.dumps(value)) > bounds.MAX_SCHEMA_BYTES:
        raise ValueError(f"the schema is larger than {bounds.MAX_SCHEMA_BYTES} bytes")
    level: list[Any] = [value]
    for _ in range(bounds.MAX_SCHEMA_DEPTH):
        inner = [v.values() if isinstance(v, dict) else v for v in level]
        level = [v for values in inner for v in values if isinstance(v, dict | list)]
        if not level:
            return value
    raise ValueError(f"the schema is nested deeper than {bounds.MAX_SCHEMA_DEPTH} levels")


_TEXT = {"type": "string"}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_STOP = {**_TEXT, "minLength": 1, "maxLength": bounds.MAX_STOP_LENGTH}
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": _TEXT},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_BIAS = {"type": "number", "minimum": -100, "maximum": 100}

Stops = Annotated[
    list[str],
    Checked(
        _stops, {"anyOf": [_STOP, {"type": "array", "items": _STOP, "maxItems": bounds.MAX_STOPS}]}
    ),
]
Prompts = Annotated[
    list[str | list[int]],
    Checked(
        _prompts,
        {
            "anyOf": [
                _TEXT,
                {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": bounds.MAX_ANSWERS},
                _IDS,
                {"type": "array", "items": _IDS, "minItems": 1, "maxItems": bounds.MAX_ANSWERS},
            ]
        },
    ),
]
LogitBias = Annotated[
    dict[int, float],
    Checked(
        _bias,
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": _BIAS,
            "maxProperties": bounds.MAX_LOGIT_BIAS,
        },
    ),
]
Content = Annotated[str, Checked(_content, {"anyOf": [_TEXT, {"type": "array", "items": _PART}]})]
Schema = Annotated[dict[str, Any], Checked(_schema, {"type": "object"})]

Name = Annotated[str, Field(max_length=bounds.MAX_NAME)]
ToolName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Token = Annotated[int, Field(ge=0, lt=1 << 31)]
Count = Annotated[int, Field(ge=1, lt=1 << 31)]
Labels = Annotated[dict[str, str], Field(max_length=64, fail_fast=True)]


class Asked(BaseModel):
    """A JSON object of a request: nothing is converted, nothing is ignored."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


# ------------------------------------------------------------------------ what both kinds share


class StreamOptions(Asked):
    include_usage: bool | None = None
    continuous_usage_stats: Annotated[Any, only(False)] = None
    include_obfuscation: Annotated[Any, only(False)] = None


class Generation(Asked):
    """What a chat and a completion have in common."""

    model: Name | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=bounds.MAX_ANSWERS)] | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31, description="-1 and 0: all.")] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: LogitBias | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None

    stop: Stops | None = None
    stop_token_ids: (
        Annotated[list[Token], Field(max_length=bounds.MAX_STOP_TOKENS, fail_fast=True)] | None
    ) = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None

    understudy: Annotated[
        bool | None, Field(description="What the experts did, in the response; ours.")
    ] = None

    user: Name | None = None
    metadata: Labels | None = None

    best_of: Annotated[Any, only(1)] = None
    suffix: Annotated[Any, only("")] = None
    store: Annotated[Any, only(False)] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    logits_processors: Annotated[Any, only([])] = None
    spaces_between_special_tokens: Annotated[Any, only(True)] = None
    prompt_logprobs: Annotated[Any, only()] = None
    use_beam_search: Annotated[Any, only(False)] = None

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self


# ------------------------------------------------------------------------------------------- chat


class CalledFunction(Asked):
    name: Name
    arguments: str


class ToolCall(Asked):
    """A call that the model has made, sent back to it."""

    id: Name | None = None
    type: Literal["function"] | None = None
    index: int | None = None
    function: CalledFunction


class Spoken(Asked):
    """A message to the model."""

    role: Literal["system", "developer", "user"]
    content: Content
    name: Name | None = None
    tool_calls: Annotated[Any, only([])] = None
    tool_call_id: Annotated[Any, only()] = None


class FromTool(Asked):
    """What a tool has answered."""

    role: Literal["tool"]
    content: Content
    tool_call_id: Name | None = None
    name: Name | None = None


class FromAssistant(Asked):
    """What the model has said before; also as the openai client gives our own answers back."""

    role: Literal["assistant"]
    content: Content | None = None
    name: Name | None = None
    tool_calls: (
        Annotated[list[ToolCall], Field(max_length=bounds.MAX_TOOLS, fail_fast=True)] | None
    ) = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: Annotated[Any, only([])] = None
    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only()] = None


# Names of alternatives are told from names of fields by their brackets.
SPOKEN, TOOL, ASSISTANT = "(spoken)", "(tool)", "(assistant)"
_ROLES = {
    "system": SPOKEN, "developer": SPOKEN, "user": SPOKEN, "tool": TOOL, "assistant": ASSISTANT
}  # fmt: skip


def _role(value: Any) -> str | None:
    role = value.get("role") if isinstance(value, dict) else getattr(value, "role", None)
    return _ROLES.get(role) if isinstance(role, str) else None


Message = Annotated[
    Annotated[Spoken, Tag(SPOKEN)]
    | Annotated[FromTool, Tag(TOOL)]
    | Annotated[FromAssistant, Tag(ASSISTANT)],
    Discriminator(
        _role,
        custom_error_type="role",
        custom_error_message="has a role: system, developer, user, assistant or tool",
    ),
]


class Function(Asked):
    name: ToolName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Asked):
    type: Literal["function"]
    function: Function


class JsonSchema(Asked):
    name: ToolName
    description: str | None = None
    schema_: Annotated[Schema, Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Asked):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to type json_schema, and only there")
        return self


Messages = Annotated[
    list[Message], Field(min_length=1, max_length=bounds.MAX_MESSAGES, fail_fast=True)
]
Tools = Annotated[list[Tool], Field(max_length=bounds.MAX_TOOLS, fail_fast=True)]
TemplateArguments = Annotated[dict[str, Any], Field(max_length=64)]


class Conversation(Asked):
    """What a chat template makes a prompt of."""

    messages: Messages
    tools: Tools | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: TemplateArguments | None = None

    @model_validator(mode="after")
    def _ends_in_one_way(self) -> Self:
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise ValueError(
                    "continue_final_message and add_generation_prompt exclude each other"
                )
            if self.messages[-1].role != "assistant":
                raise ValueError("continue_final_message needs a last message of the assistant")
        return self


class NamedTool(NamedTuple):
    """The choice of one tool."""

    name: str


def _choice(value: Any) -> Any:
    match value:
        case "none" | "auto" | "required":
            return value
        case {"type": "function", "function": {"name": str(name), **rest}, **more}:
            if not (rest or more):
                return NamedTool(name)
    raise ValueError(
        'must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
    )


_NAMED = {
    "type": "object",
    "properties": {"name": {"type": "string"}},
    "required": ["name"],
    "additionalProperties": False,
}
_CHOICE = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        {
            "type": "object",
            "properties": {"type": {"const": "function"}, "function": _NAMED},
            "required": ["type", "function"],
            "additionalProperties": False,
        },
    ]
}
ToolChoice = Annotated[Literal["none", "auto", "required"] | NamedTool, Checked(_choice, _CHOICE)]


class ChatRequest(Conversation, Generation):
    """The body of ``POST /v1/chat/completions``."""

    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=bounds.MAX_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    safety_identifier: Name | None = None
    prompt_cache_key: Name | None = None

    audio: Annotated[Any, only()] = None
    modalities: Annotated[Any, only(["text"])] = None
    prediction: Annotated[Any, only()] = None
    functions: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only("none", "auto")] = None
    reasoning_effort: Annotated[Any, only()] = None
    verbosity: Annotated[Any, only()] = None
    web_search_options: Annotated[Any, only()] = None
    moderation: Annotated[Any, only()] = None
    prompt_cache_options: Annotated[Any, only()] = None
    prompt_cache_retention: Annotated[Any, only()] = None
    echo: Annotated[Any, only(False)] = None
    add_special_tokens: Annotated[Any, only(False)] = None

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        both = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(both) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ; send one of them")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        if isinstance(self.tool_choice, NamedTool):
            wanted = self.tool_choice.name
            if wanted not in [tool.function.name for tool in self.tools or ()]:
                raise ValueError(f"tool_choice names {wanted}, which is not among the tools")
        structured = self.response_format is not None and self.response_format.type != "text"
        if structured and self.tools and self.tool_choice != "none":
            raise ValueError("response_format and tools cannot both shape one answer")
        return self


# ------------------------------------------------------------------------------------ completions


class CompletionRequest(Generation):
    """The body of ``POST /v1/completions``."""

    prompt: Prompts
    add_special_tokens: bool | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=bounds.MAX_TOP_LOGPROBS)] | None = None


# ------------------------------------------------------------------------------------- tokenizing


class TokenizeText(Asked):
    model: Name | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChat(Conversation):
    model: Name | None = None
    add_special_tokens: Annotated[Any, only(False)] = None
    return_token_strs: bool | None = None


def _kind(value: Any) -> str:
    has_messages = "messages" in value if isinstance(value, dict) else hasattr(value, "messages")
    return CHAT if has_messages else TEXT


TEXT, CHAT = "(text)", "(chat)"
TokenizeRequest = Annotated[
    Annotated[TokenizeText, Tag(TEXT)] | Annotated[TokenizeChat, Tag(CHAT)], Discriminator(_kind)
]


class DetokenizeRequest(Asked):
    model: Name | None = None
    tokens: Annotated[list[Token], Field(fail_fast=True)]
