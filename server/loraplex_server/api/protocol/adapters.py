"""/v1/adapters, its generator, and the routes of vLLM that load and unload."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from loraplex_adapter_store.selector import (
    MAX_EXAMPLE,
    MAX_EXAMPLES,
    MIN_EXAMPLES,
    GenerationMethod,
)
from loraplex_server.adapters.card_file import MAX_CARD_EXAMPLES, MAX_CARD_TEXT

from .body import Body, Few, JsonObject

__all__ = [
    "Adapter",
    "AdapterEdit",
    "AdapterList",
    "AdapterSourceBody",
    "Deleted",
    "GenerateAdapterBody",
    "JobShown",
    "LoadLoraBody",
    "RevisionList",
    "TrainAdapterBody",
    "TrainingChat",
    "UnloadLoraBody",
]

_Wording = Annotated[str, Field(max_length=MAX_CARD_TEXT)]
MAX_CHATS = 10_000  # of a training
_Prompt = Annotated[str, Field(min_length=1, max_length=2000)]


class AdapterSourceBody(Body):
    """``source``: the name of a directory under a registered root, or a URI."""

    source: Annotated[str, Field(min_length=1, max_length=2048)]
    description: _Wording | None = None
    examples: Annotated[Few[_Wording], Field(max_length=MAX_CARD_EXAMPLES)] | None = None
    defaults: JsonObject | None = None  # of requests: see docs/adapter-cards.md
    wait: bool | None = None  # False: answer 202 with a job at once


class AdapterEdit(Body):
    """What a PATCH changes; absent fields stay, null takes away."""

    model_config = ConfigDict(strict=True, extra="forbid")

    description: _Wording | None = None
    examples: Annotated[Few[_Wording], Field(max_length=MAX_CARD_EXAMPLES)] | None = None
    defaults: JsonObject | None = None  # a JSON merge patch


# Left out or empty, these two are refused by the routes, in vLLM's words.
_NEEDED = {"minLength": 1}


class LoadLoraBody(Body):
    model_config = ConfigDict(json_schema_extra={"required": ["lora_name", "lora_path"]})

    lora_name: Annotated[str, Field(max_length=512, json_schema_extra=_NEEDED)] = ""
    lora_path: Annotated[str, Field(max_length=2048, json_schema_extra=_NEEDED)] = ""
    load_inplace: bool | None = None


class UnloadLoraBody(Body):
    model_config = ConfigDict(json_schema_extra={"required": ["lora_name"]})

    lora_name: Annotated[str, Field(max_length=512, json_schema_extra=_NEEDED)] = ""
    lora_int_id: int | None = None


_ExampleText = Annotated[str, Field(min_length=1, max_length=MAX_EXAMPLE)]


class ExamplePair(BaseModel):
    model_config = ConfigDict(extra="forbid")

    prompt: _ExampleText
    answer: _ExampleText


class GenerateAdapterBody(BaseModel):
    """With ``examples``, the answer is 202 and a job, and the draft answers meanwhile."""

    model_config = ConfigDict(extra="forbid")

    description: Annotated[str, Field(min_length=1, max_length=2000)]
    wordings: Annotated[Few[_Wording], Field(max_length=100)] = []  # further ones of the task
    prompts: Annotated[Few[_Prompt], Field(max_length=64)] = []  # unlabelled inputs; icm-lora
    examples: (
        Annotated[Few[ExamplePair], Field(min_length=MIN_EXAMPLES, max_length=MAX_EXAMPLES)] | None
    ) = None
    budget_s: Annotated[float, Field(gt=0, le=86400)] | None = None  # to learn from them for
    wait: bool = False  # for the job's end: 201 and the card
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
    """A line of the data of `loraplex train`. What the assistant says is learnt."""

    model_config = ConfigDict(extra="forbid")

    messages: Annotated[Few[TrainingMessage], Field(min_length=1, max_length=256)]
    tools: Annotated[Few[JsonObject], Field(max_length=128)] = []


class TrainAdapterBody(BaseModel):
    """LoRA on every linear layer; a tenth of the examples is held out to tell what was learnt."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(min_length=1, max_length=128)]
    examples: Annotated[Few[TrainingChat | ExamplePair], Field(min_length=2, max_length=MAX_CHATS)]
    description: _Wording | None = None
    steps: Annotated[int, Field(ge=1, le=10_000)] = 200
    budget_s: Annotated[float, Field(gt=0, le=86400)] | None = None  # training stops then
    rank: Annotated[int, Field(ge=1, le=256)] = 8
    alpha: Annotated[float, Field(gt=0, le=1024)] | None = None  # null: 2 · rank
    lr: Annotated[float, Field(gt=0, le=1)] = 1e-3
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] = 0
    replace: bool = False  # true: a name that exists gets a new revision


class HostBytes(BaseModel):
    disk: int
    host: int


class TierBytes(BaseModel):
    """Now, 0 where it is not."""

    disk: int
    host: int | None
    device: int | None  # of a cluster: on all engines together


class AdapterUsage(BaseModel):
    """Since the start of the process that answers. A mixture counts for none of its parts."""

    requests: int
    output_tokens: int
    tokens_per_s: float  # of answers, mean of the last ten seconds


class LoadMs(BaseModel):
    """How long the last load took, in milliseconds."""

    host: float | None  # from disk; null: it was not loaded since the start
    device: float | None  # from the host; null: it is not there


class Adapter(BaseModel):
    """A card. Routes that make or change an adapter add what they know of it.

    What tells of others' requests is null in the card of an adapter that the operator shares.
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
    defaults: dict[str, JsonValue]  # of requests that do not say it themselves
    expires: float | None = None
    task: Literal["SEQ_CLS", "TOKEN_CLS"] | None  # of a classifier; null: it generates text


class AdapterList(BaseModel):
    object: Literal["list"]
    data: list[Adapter]


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
    """How far a job is that learns from examples; steps count forwards and backwards."""

    step: int
    n_steps: int
    held_out_nll: float | None  # of pairs that the judged copies have not seen; null: not yet
    serves: Literal["draft", "learnt"] | None  # what answers under the name; null: nothing yet
    gained: bool | None  # null: it has not ended


class JobTraining(BaseModel):
    """How far a job is that trains on chats. Losses are in nats a token of the assistant's."""

    step: int
    n_steps: int
    n_examples: int
    loss: float | None  # of the examples trained on, smoothed; null: no step yet
    validation_loss: float | None  # of the examples held out, the last time
    base_validation_loss: float | None  # of the base on the same ones
    tokens_per_s: float | None


class JobShown(BaseModel):
    id: str
    object: Literal["job"]
    adapter: str
    created: int
    status: Literal["running", "succeeded", "failed", "cancelled"]
    stage: str
    progress: float
    digest: str | None  # of the adapter that answers under the name
    learning: JobLearning | None
    training: JobTraining | None
    error: JobError | None
