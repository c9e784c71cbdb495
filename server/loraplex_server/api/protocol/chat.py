"""POST /v1/chat/completions."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, JsonValue

from .body import INT64_END, Body, Few, JsonObject
from .generation import (
    MAX_LOGPROBS,
    AnsweredBy,
    FinishReason,
    GenerationBody,
    PromptLogprobs,
    Usage,
)
from .tools import ToolCall, ToolChoice, Tools

MAX_MESSAGES = 4096  # in a chat


class ChatMessage(Body):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Few[JsonObject] | None = None
    name: str | None = None
    tool_calls: Few[JsonObject] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


ChatMessages = Annotated[Few[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]


class ChatBody(GenerationBody):
    messages: ChatMessages
    max_tokens: Annotated[int, Field(ge=1, lt=INT64_END)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=INT64_END)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: JsonObject | None = None
    documents: Few[JsonObject] | None = None  # for the chat template, like the next field
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None  # None: auto
    parallel_tool_calls: bool | None = None


class Message(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None = None
    reasoning_content: str | None = None  # absent if there is none, like the next field
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    index: int
    message: Message
    logprobs: dict[str, JsonValue] | None
    finish_reason: FinishReason | Literal["tool_calls"]
    stop_reason: str | int | None
    token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = None  # absent unless requested, like the next field
    prompt_token_ids: list[int] | None = None
    adapter: AnsweredBy | None
    loraplex: dict[str, JsonValue] | None = None  # candidates and scores of ``auto``
