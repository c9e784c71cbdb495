"""What the bodies and answers of chat and plain completions share."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field, JsonValue

from .body import INT64_END, Body, Few, JsonList, JsonObject, LimitedDict, Name, TokenId
from .structured_output import Choices, JsonSchema, ResponseFormat, StructuredOutputs

__all__ = [
    "MAX_LOGIT_BIAS",
    "MAX_LOGPROBS",
    "AdapterBody",
    "AdapterChoice",
    "AnsweredBy",
    "CallBody",
    "FinishReason",
    "GenerationBody",
    "PromptLogprobs",
    "StopStrings",
    "StreamOptions",
    "Usage",
]

MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20  # most likely tokens at one place
MAX_ALLOWED = 65536  # token ids
StopString = Annotated[str, Field(min_length=1, max_length=1000)]
StopStrings = Annotated[Few[StopString], Field(max_length=16)]

AdapterChoice = str | JsonObject | JsonList  # a name, an object, or a mixture: see docs/http-api.md


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class AdapterBody(Body):
    """Who answers."""

    model: Name | None = None
    adapter: AdapterChoice | None = None
    adapter_id: Name | None = None  # LoRAX


class CallBody(AdapterBody):
    """What every route that generates takes under the same name."""

    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=INT64_END)] | None = None  # -1 and 0: all
    seed: Annotated[int, Field(ge=-INT64_END, lt=INT64_END)] | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None


class GenerationBody(CallBody):
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, lt=INT64_END)] | None = None
    max_tokens: Annotated[int, Field(ge=0, lt=INT64_END)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=INT64_END)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)] | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_LOGIT_BIAS),
            LimitedDict(MAX_LOGIT_BIAS),
        ]
        | None
    ) = None
    stop: StopString | StopStrings | None = None
    allowed_token_ids: (
        Annotated[Few[TokenId], Field(min_length=1, max_length=MAX_ALLOWED)] | None
    ) = None
    bad_words: (
        Annotated[Few[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=64)]
        | None
    ) = None
    stop_token_ids: Annotated[Few[TokenId], Field(max_length=128)] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None  # vLLM's
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None  # vLLM's, like the next
    guided_json: JsonSchema | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None


FinishReason = Literal["stop", "length"]


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptTokenLogprob(BaseModel):
    logprob: float
    rank: int
    decoded_token: str


# For each token of the prompt by id: itself and the most likely ones; null for the first.
PromptLogprobs = list[dict[str, PromptTokenLogprob] | None]


class AnsweredBy(BaseModel):
    """Which adapter answered; null for a plain answer of the base."""

    name: str | None
    digest: str | None
    chosen_by: dict[str, JsonValue] | None = None
