"""Bodies of Tinker's API, as the package tinker sends them."""

from typing import Annotated, Any, Literal

from pydantic import Field

from loraplex_server.api.protocol.body import INT64_END, Body, Few, JsonObject, Name, TokenId
from loraplex_server.api.protocol.generation import MAX_LOGPROBS, StopString, StopStrings

MAX_PROMPT = 140_000  # tokens; the context is smaller
Number = Annotated[int, Field(ge=0, lt=INT64_END)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Life = Annotated[int, Field(ge=1, le=315_360_000)]  # seconds
Labels = Annotated[dict[str, str], Field(max_length=64)]


class SessionBody(Body):
    user_metadata: JsonObject | None = None
    sdk_version: str | None = None


class OfSession(Body):
    session_id: Name


class LoraConfig(Body):
    rank: Annotated[int, Field(ge=1, le=1024)]
    seed: Annotated[int, Field(ge=0, lt=INT64_END)] | None = None
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class OptimizerConfig(Body):
    type: Literal["adamw"] = "adamw"


class CreateModelBody(OfSession):
    model_seq_id: Number
    base_model: Name
    user_metadata: JsonObject | None = None
    lora_config: LoraConfig = Field(default_factory=lambda: LoraConfig(rank=32))
    optimizer_config: OptimizerConfig | None = None


class OfModel(Body):
    model_id: Name


class Call(OfModel):
    seq_id: Annotated[int, Field(ge=1, lt=INT64_END)]


class AdamParams(Body):
    """The settings of a step, with the package's defaults."""

    learning_rate: Finite = 1e-4
    beta1: Share = 0.9
    beta2: Share = 0.95
    eps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-12
    weight_decay: Finite = 0.0
    grad_clip_norm: Finite = 0.0


class OptimStepBody(Call):
    adam_params: AdamParams


class SaveWeightsBody(Call):
    path: Name
    ttl_seconds: Life | None = None
    overwrite: bool = False
    user_metadata: Labels | None = None


class SaveForSamplerBody(Call):
    path: Name | None = None
    sampling_session_seq_id: Number | None = None
    kind: Literal["snapshot", "inflight"] = "snapshot"
    ttl_seconds: Life | None = None
    user_metadata: Labels | None = None


class LoadWeightsBody(Body):
    """A load into a client (``model_id``), or into a new one (``session_id``)."""

    model_id: Name | None = None
    seq_id: Number | None = None
    session_id: Name | None = None
    model_seq_id: Number | None = None
    base_model: Name | None = None
    user_metadata: JsonObject | None = None
    path: Name
    optimizer: bool
    optimizer_config: OptimizerConfig | None = None


class SamplingSessionBody(OfSession):
    sampling_session_seq_id: Number
    base_model: Name | None = None
    model_path: Name | None = None


class OfSampler(Body):
    sampling_session_id: Name


class Chunk(Body):
    type: Literal["encoded_text"]
    tokens: Annotated[Few[TokenId], Field(max_length=MAX_PROMPT)]


class ModelInput(Body):
    chunks: Annotated[Few[Chunk], Field(min_length=1, max_length=4096)]


class SamplingParamsBody(Body):
    max_tokens: Annotated[int, Field(ge=1, lt=INT64_END)] | None = None
    seed: Annotated[int, Field(ge=0, lt=INT64_END)] | None = None
    stop: StopString | StopStrings | Annotated[Few[TokenId], Field(max_length=128)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=-1, lt=INT64_END)] = -1
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0


class SampleBody(OfSampler):
    seq_id: Number
    num_samples: Annotated[int, Field(ge=1, lt=INT64_END)] = 1
    prompt: ModelInput
    sampling_params: SamplingParamsBody
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0
    topk_sample_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 0
    prompt_logprobs_last_n: Annotated[int, Field(ge=1, lt=INT64_END)] | None = None
    target_prompt_logprobs: Any = None
    prompt_alt_tokens_k: int = 0
    record_stability_info: bool | None = None


class FutureBody(Body):
    request_id: Name


class PathBody(Body):
    tinker_path: Name


class LifeBody(Body):
    ttl_seconds: Life | None = None
