"""POST /v1/chat/completions."""

from __future__ import annotations

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
from .tools import NamedToolChoice, ToolCall, ToolChoice, ToolDefinition

__all__ = ["MAX_MESSAGES", "ChatBody", "ChatCompletion", "ChatMessage", "NamedToolChoice"]

MAX_MESSAGES = 4096  # of a chat


class ChatMessage(Body):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | Few[JsonObject] | None = None
    name: str | None = None
    tool_calls: Few[JsonObject] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None


class ChatBody(GenerationBody):
    messages: Annotated[Few[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(ge=1, lt=INT64_END)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=INT64_END)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: JsonObject | None = None
    documents: Few[JsonObject] | None = None  # for the template, like the next
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = None
    tools: Annotated[Few[ToolDefinition], Field(max_length=128)] | None = None
    tool_choice: ToolChoice | None = None  # None: auto
    parallel_tool_calls: bool | None = None


class Message(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None = None
    reasoning_content: str | None = None  # absent unless there is some, like the next
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
    prompt_logprobs: PromptLogprobs | None = None  # absent unless asked for, like the next
    prompt_token_ids: list[int] | None = None
    adapter: AnsweredBy | None
    loraplex: dict[str, JsonValue] | None = None  # of ``auto``: candidates and scores
