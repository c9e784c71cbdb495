"""Request bodies as they arrive. Pydantic ends here: everything behind gets plain values.

Types are strict ("0.7" is no number); unknown fields are kept aside, warned about once, ignored.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = [
    "AdapterSourceBody",
    "ChatBody",
    "ChatMessage",
    "CompletionBody",
    "DetokenizeBody",
    "GenerationBody",
    "LoadLoraBody",
    "RouteBody",
    "StreamOptions",
    "TokenizeBody",
    "UnloadLoraBody",
]

JsonObject = dict[str, object]
_INT64 = (1 << 63) - 1


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class StreamOptions(_Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(_Body):
    """What chat and plain completions share."""

    model: Annotated[str, Field(max_length=512)] | None = None
    adapter: str | JsonObject | list[object] | None = None
    adapter_id: Annotated[str, Field(max_length=512)] | None = None  # LoRAX
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=_INT64)] | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_INT64)] | None = None  # -1 and 0: all
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-_INT64 - 1, le=_INT64)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=128)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None


class ChatMessage(_Body):
    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[JsonObject] | None = None
    name: str | None = None
    tool_calls: list[JsonObject] | None = None
    tool_call_id: str | None = None


class RouteBody(_Body):
    """Either a text or chat messages."""

    input: Annotated[str, Field(max_length=100_000)] | None = None
    messages: list[ChatMessage] | None = None


class ChatBody(GenerationBody):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=0, le=_INT64)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: JsonObject | None = None


class CompletionBody(GenerationBody):
    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: int | None = None
    suffix: str | None = None
    add_special_tokens: bool | None = None


class TokenizeBody(_Body):
    """Either ``prompt`` or ``messages``."""

    model: str | None = None
    adapter: str | JsonObject | list[object] | None = None
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: JsonObject | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(_Body):
    model: str | None = None
    tokens: Annotated[list[int], Field(max_length=1_000_000)]


class AdapterSourceBody(_Body):
    """``source``: the name of a directory under a registered root, or a URI."""

    source: Annotated[str, Field(min_length=1, max_length=2048)]
    description: Annotated[str, Field(max_length=2000)] | None = None
    examples: Annotated[list[str], Field(max_length=100)] | None = None
    wait: bool | None = None  # False: answer 202 with a job at once


class LoadLoraBody(_Body):
    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool | None = None


class UnloadLoraBody(_Body):
    lora_name: str = ""
    lora_int_id: int | None = None
