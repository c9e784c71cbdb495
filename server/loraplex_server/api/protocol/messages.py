"""POST /v1/messages and /v1/messages/count_tokens, as in Anthropic's API."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, JsonValue

from .body import INT64_END, Body, Few, JsonObject
from .generation import AdapterBody, AnsweredBy, CallBody, StopStrings
from .tools import ToolName


class MessageTurn(Body):
    role: Literal["user", "assistant"]
    content: str | Few[JsonObject]  # a text or content blocks


class JsonFormat(Body):
    type: Literal["json_schema"]
    schema_: Annotated[JsonObject, Field(alias="schema")]


class OutputConfig(Body):
    format: JsonFormat | None = None


class MessageTool(Body):
    name: ToolName
    description: str | None = None
    input_schema: JsonObject
    type: Literal["custom"] | None = None
    strict: bool | None = None


class MessageToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None  # with the type tool
    disable_parallel_tool_use: bool | None = None


class CountTokensBody(AdapterBody):
    messages: Annotated[Few[MessageTurn], Field(min_length=1, max_length=4000)]
    system: str | Few[JsonObject] | None = None
    tools: Annotated[Few[MessageTool], Field(max_length=128)] | None = None
    tool_choice: MessageToolChoice | None = None


class MessagesBody(CountTokensBody, CallBody):
    max_tokens: Annotated[int, Field(ge=1, lt=INT64_END)]
    stop_sequences: StopStrings | None = None
    output_config: OutputConfig | None = None
    output_format: JsonFormat | None = None  # the older name of output_config.format
    metadata: JsonObject | None = None  # accepted and ignored


class CountedTokens(BaseModel):
    input_tokens: int


class MessageUsage(BaseModel):
    """The prompt is the sum of tokens from the cache and other input tokens."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageAnswer(BaseModel):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]  # blocks: text, tool_use, thinking
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessageUsage
    adapter: AnsweredBy | None
    loraplex: dict[str, JsonValue] | None = None  # candidates and scores of ``auto``
