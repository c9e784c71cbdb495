"""/v1/adapters, its generator and training, and vLLM's routes to load and unload."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from loraplex_adapter_store.names.selector import (
    MAX_EXAMPLE,
    MAX_EXAMPLES,
    MIN_EXAMPLES,
    GenerationMethod,
)
from loraplex_server.adapters.adding.card_file import MAX_CARD_EXAMPLES, MAX_CARD_TEXT

from .body import INT64_END, Body, Few, JsonObject
from .training_shape import TrainingEvaluation, TrainingShape

_CardText = Annotated[str, Field(max_length=MAX_CARD_TEXT)]
MAX_CHATS = 10_000  # examples of one training
_Prompt = Annotated[str, Field(min_length=1, max_length=2000)]


class AdapterSourceBody(Body):
    """``source`` is a URI, or the name of a directory under a registered root."""

    source: Annotated[str, Field(min_length=1, max_length=2048)]
    description: _CardText | None = None
    examples: Annotated[Few[_CardText], Field(max_length=MAX_CARD_EXAMPLES)] | None = None
    defaults: JsonObject | None = None  # defaults of requests: see docs/adapter-cards.md
    wait: bool | None = None  # False: answer 202 with a job at once


class AdapterEdit(Body):
    """The changes of a PATCH. Absent fields stay, and null removes a field."""

    model_config = ConfigDict(strict=True, extra="forbid")

    description: _CardText | None = None
    examples: Annotated[Few[_CardText], Field(max_length=MAX_CARD_EXAMPLES)] | None = None
    defaults: JsonObject | None = None  # a JSON merge patch


# The routes refuse missing and empty values with vLLM's messages.
_NEEDED = {"minLength": 1}


class LoadLoraBody(Body):
    model_config = ConfigDict(json_schema_extra={"required": ["lora_name", "lora_path"]})

    lora_name: Annotated[str, Field(max_length=512, json_schema_extra=_NEEDED)] = ""
    lora_path: Annotated[str, Field(max_length=2048, json_schema_extra=_NEEDED)] = ""
    load_inplace: bool | None = None


class UnloadLoraBody(Body):
    model_config = ConfigDict(json_schema_extra={"required": ["lora_name"]})

    lora_name: Annotated[str, Field(max_length=512, json_schema_extra=_NEEDED)] = ""
    lora_int_id: Annotated[int, Field(ge=-INT64_END, lt=INT64_END)] | None = None


_ExampleText = Annotated[str, Field(min_length=1, max_length=MAX_EXAMPLE)]


class ExamplePair(BaseModel):
    model_config = ConfigDict(extra="forbid")

    prompt: _ExampleText
    answer: _ExampleText


class GenerateAdapterBody(BaseModel):
    """Makes an adapter. With ``examples``, the answer is 202 and a job; a draft serves first."""

    model_config = ConfigDict(extra="forbid")

    description: Annotated[str, Field(min_length=1, max_length=2000)]
    wordings: Annotated[
        Few[_CardText], Field(max_length=100)
    ] = []  # further descriptions of the task
    prompts: Annotated[Few[_Prompt], Field(max_length=64)] = []  # unlabelled inputs; icm-lora
    examples: (
        Annotated[Few[ExamplePair], Field(min_length=MIN_EXAMPLES, max_length=MAX_EXAMPLES)] | None
    ) = None
    budget_s: Annotated[float, Field(gt=0, le=86400)] | None = None  # time to learn
    wait: bool = False  # answer at the job's end, with 201 and the card
    method: GenerationMethod = "auto"
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    name: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    ttl_s: Annotated[float, Field(gt=0, le=30 * 86400)] | None = None
    samples: Annotated[int, Field(ge=0, le=16)] = 0
    force: bool = False
    probe: bool = True  # measure the agreement with the base on unrelated prompts


class TrainingMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant", "tool"]
    content: Annotated[str, Field(max_length=100_000)]


class TrainingChat(BaseModel):
    """A line of `loraplex train`'s data. The assistant's messages are learnt."""

    model_config = ConfigDict(extra="forbid")

    messages: Annotated[Few[TrainingMessage], Field(min_length=1, max_length=256)]
    tools: Annotated[Few[JsonObject], Field(max_length=128)] = []


class TrainAdapterBody(TrainingShape):
    """Trains an adapter on every linear. A tenth of the examples is held out for validation."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=128)]
    examples: Annotated[Few[TrainingChat | ExamplePair], Field(min_length=2, max_length=MAX_CHATS)]
    description: _CardText | None = None
    steps: Annotated[int, Field(ge=1, le=10_000)] = 200
    budget_s: Annotated[float, Field(gt=0, le=86400)] | None = None  # training stops then
    lr: Annotated[float, Field(gt=0, le=1)] = 1e-3
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    replace: bool = False  # true: a name that exists gets a new revision


class HostBytes(BaseModel):
    disk: int
    host: int


class TierBytes(BaseModel):
    """Bytes of the adapter now; 0 in tiers that do not hold the adapter."""

    disk: int
    host: int | None
    device: int | None  # in a cluster: the sum of all engines


class AdapterUsage(BaseModel):
    """Use since the start of the answering process. Use in mixtures is not counted."""

    requests: int
    output_tokens: int
    tokens_per_s: float  # output tokens, mean of the last ten seconds


class LoadMs(BaseModel):
    """Duration of the last load, in milliseconds."""

    host: float | None  # from disk; null: not loaded since the start
    device: float | None  # from the host; null: not on the device


class Adapter(BaseModel):
    """A card. Routes that make or change an adapter add further fields.

    Fields about the requests of others are null in the card of an adapter that the operator shares.
    """

    model_config = ConfigDict(extra="allow")

    object: Literal["adapter"]
    name: str
    digest: str
    revision: int
    family: str
    description: str | None
    examples: list[str]
    ranks: list[int]
    n_bytes: TierBytes
    created: float
    base_fingerprint: str
    pinned: bool
    n_leases: int | None
    tier: Literal["device", "host", "disk"] | None
    usage: AdapterUsage | None
    last_load_ms: LoadMs | None
    report: dict[str, JsonValue] | None = None  # of the load; absent in lists
    provenance: dict[str, JsonValue]
    defaults: dict[str, JsonValue]  # for requests without these fields
    expires: float | None = None
    task: Literal["SEQ_CLS", "TOKEN_CLS"] | None  # of a classifier; null: generates text


class RefusedFolder(BaseModel):
    name: str
    reason: str


class AdapterList(BaseModel):
    object: Literal["list"]
    data: list[Adapter]
    refused: list[RefusedFolder]  # of --adapters-dir; empty unless the key sees all adapters


class Revision(BaseModel):
    object: Literal["adapter.revision"]
    name: str
    revision: int
    digest: str
    created: float
    family: str
    description: str | None
    current: bool


class RevisionList(BaseModel):
    object: Literal["list"]
    data: list[Revision]


class FreedBytes(HostBytes):
    device: int


class Deleted(BaseModel):
    name: str
    digest: str
    drained: bool
    n_leases_waited: int
    n_bytes_freed: FreedBytes
    deleted: Literal[True]


class JobError(BaseModel):
    message: str
    code: str


class JobLearning(BaseModel):
    """The progress of a job that learns from examples. Steps count forwards and backwards."""

    step: int
    held_out_nll: float | None  # loss of held-out pairs; null: not yet
    serves: Literal["draft", "learnt"] | None  # the adapter that answers now; null: none
    gained: bool | None  # null: the job has not ended


class JobTraining(BaseModel):
    """The progress of a job that trains on chats. Losses are in nats per assistant token."""

    step: int
    n_steps: int
    n_examples: int
    loss: float | None  # of training examples, smoothed; null: no step yet
    validation_loss: float | None  # of held-out examples, the last value
    base_validation_loss: float | None  # of the base on the same examples
    tokens_per_s: float | None
    stopped_by: Literal["steps", "time"] | None  # null: not at its end
    evaluation: TrainingEvaluation | None  # null: without ``metric``, or not at its end


class JobShown(BaseModel):
    id: str
    object: Literal["job"]
    adapter: str
    created: int
    status: Literal["running", "succeeded", "failed", "cancelled"]
    stage: str
    progress: float
    digest: str | None  # of the adapter that the name now has
    learning: JobLearning | None
    training: JobTraining | None
    error: JobError | None
