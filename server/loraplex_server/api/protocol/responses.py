"""POST /v1/responses, and stored responses."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, JsonValue

from .body import INT64_END, Body, Few, JsonObject, Metadata
from .generation import AnsweredBy, CallBody, NamedSchema
from .tools import FunctionDefinition, NamedFunction

_ResponseId = Annotated[str, Field(min_length=1, max_length=128)]


class TextFormat(NamedSchema):
    type: Literal["text", "json_object", "json_schema"]


class TextOptions(Body):
    format: TextFormat | None = None


class ReasoningOptions(Body):
    effort: Annotated[str, Field(max_length=32)] | None = None  # for the chat template


class _Function(Body):
    type: Literal["function"]


class ResponseTool(FunctionDefinition, _Function):
    """A tool. Its type is checked first, since other types have other fields."""


class NamedTool(NamedFunction):
    type: Literal["function"]


class ResponsesBody(CallBody):
    input: str | Annotated[Few[JsonObject], Field(min_length=1, max_length=4000)]
    instructions: str | None = None
    previous_response_id: _ResponseId | None = None
    store: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=INT64_END)] | None = None
    metadata: Metadata | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: Annotated[Few[ResponseTool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    include: Annotated[Few[str], Field(max_length=16)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    stream_options: JsonObject | None = None  # accepted and ignored: streams are not obfuscated


class DeletedResponse(BaseModel):
    id: str
    object: Literal["response"]
    deleted: Literal[True]


class InputDetails(BaseModel):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(BaseModel):
    reasoning_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class ResponseAnswer(BaseModel):
    """``output`` has items of type message, function_call and reasoning."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    model: str
    output: list[dict[str, Any]]
    usage: ResponseUsage
    incomplete_details: dict[str, str] | None
    error: None
    instructions: str | None
    metadata: dict[str, str]
    previous_response_id: str | None
    store: bool
    max_output_tokens: int | None
    parallel_tool_calls: bool
    temperature: float | None
    top_p: float | None
    text: dict[str, JsonValue]
    reasoning: dict[str, str | None]
    tools: list[dict[str, JsonValue]]
    tool_choice: str | dict[str, JsonValue]
    top_logprobs: int | None
    truncation: Literal["disabled"]
    background: Literal[False]
    adapter: AnsweredBy | None
    loraplex: dict[str, JsonValue] | None = None  # candidates and scores of ``auto``
