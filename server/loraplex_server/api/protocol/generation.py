"""The common part of bodies and answers of chats and plain completions."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, JsonValue

from .body import INT64_END, Body, Few, JsonList, JsonObject, LimitedDict, Name, TokenId

MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20  # most likely tokens at one position
MAX_ALLOWED = 65536  # token ids
StopString = Annotated[str, Field(min_length=1, max_length=1000)]
StopStrings = Annotated[Few[StopString], Field(max_length=16)]

CacheSalt = Annotated[str, Field(max_length=256)]

AdapterChoice = str | JsonObject | JsonList  # a name, an object, or a mixture: see docs/http-api.md


JsonSchema = JsonObject | bool
Choices = Annotated[Few[str], Field(min_length=1, max_length=10_000)]
FinishReason = Literal["stop", "length"]


class NamedSchema(Body):
    """A JSON schema with a name. Without ``schema``, any JSON value is allowed."""

    name: Annotated[str, Field(max_length=512)] | None = None
    description: str | None = None
    schema_: Annotated[JsonSchema | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """The types ``json`` and ``regex`` are of TGI. A schema beside the type is enforced, too."""

    type: Literal["text", "json_object", "json_schema", "json", "regex"]
    json_schema: NamedSchema | None = None  # for the type json_schema
    schema_: Annotated[JsonSchema | None, Field(alias="schema")] = None  # of llama.cpp
    value: JsonSchema | str | None = None  # of TGI: a schema, or the expression of the type regex


class StructuredOutputs(Body):
    """The constraint of an answer: exactly one of the fields."""

    json_: Annotated[JsonSchema | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class AdapterBody(Body):
    """The fields of a body that name the model and its adapter."""

    model: Name | None = None
    adapter: AdapterChoice | None = None
    adapter_id: Name | None = None  # LoRAX
    lora_path: Name | None = None  # SGLang

    @property
    def adapter_fields(self) -> dict[str, Any]:
        """Return the fields, for ``AdapterResolver.parse``."""
        return {name: getattr(self, name) for name in AdapterBody.model_fields}


class CallBody(AdapterBody):
    """The fields that all routes for text share."""

    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=INT64_END)] | None = None  # -1 and 0: all
    seed: Annotated[int, Field(ge=-INT64_END, lt=INT64_END)] | None = None
    cache_salt: CacheSalt | None = None
    drafts: bool | None = None  # False: no next tokens are guessed; the answer is the same


class Prediction(Body):
    """A text that the answer probably repeats. It changes only how fast the answer comes."""

    type: Literal["content"]
    content: str | Few[JsonObject]  # a text or parts of the type text


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
    prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None  # of vLLM
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    prediction: Prediction | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None  # of vLLM, like the next fields
    guided_json: JsonSchema | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    json_schema: JsonSchema | str | None = None  # of SGLang and llama.cpp, like the next fields
    regex: str | None = None
    ebnf: str | None = None
    grammar: str | None = None


class PromptTokensDetails(BaseModel):
    cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """Tokens that were guessed before they were computed, from the text or a ``prediction``."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None  # absent without guesses


class PromptTokenLogprob(BaseModel):
    logprob: float
    rank: int
    decoded_token: str


# At each prompt token: token id → that token and the most likely ones. Null for the first token.
PromptLogprobs = list[dict[str, PromptTokenLogprob] | None]


class AnsweredBy(BaseModel):
    """The adapter that answered; null for an answer of the base alone."""

    name: str | None
    digest: str | None
    chosen_by: dict[str, JsonValue] | None = None
