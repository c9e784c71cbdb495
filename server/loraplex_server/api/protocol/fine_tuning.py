"""/v1/fine_tuning/jobs: OpenAI's bodies and answers."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from .body import Body, JsonList, Metadata, Name
from .training_shape import TrainingEvaluation, TrainingShape

Auto = Literal["auto"]


class Hyperparameters(Body):
    """``auto``: the server chooses, from the number of examples."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=100)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1000)] = "auto"


class DpoHyperparameters(Hyperparameters):
    beta: Auto | Annotated[float, Field(gt=0, le=10)] = "auto"


class Supervised(Body):
    hyperparameters: Hyperparameters | None = None


class Dpo(Body):
    hyperparameters: DpoHyperparameters | None = None


class TuningMethod(Body):
    type: Literal["supervised", "dpo", "reinforcement"]  # the last one is refused
    supervised: Supervised | None = None
    dpo: Dpo | None = None


class TuningBody(Body, TrainingShape):
    """``hyperparameters`` is OpenAI's older place for those of the method supervised.

    The fields of ``TrainingShape`` and ``adapter`` are ours.
    """

    model: Name
    training_file: Name
    validation_file: Name | None = None
    method: TuningMethod | None = None
    hyperparameters: Hyperparameters | None = None
    suffix: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,64}$")] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 31)] | None = None
    metadata: Metadata | None = None
    integrations: JsonList | None = None  # refused
    adapter: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """A further name for the result. A name of yours that exists gets a new revision."""


class TuningError(BaseModel):
    code: str
    message: str
    param: str | None


class FineTuningJob(BaseModel):
    """A job. Times are in seconds since the epoch."""

    model_config = ConfigDict(title="FineTuningJob")

    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    model: str
    fine_tuned_model: str | None  # null until the job has succeeded
    organization_id: str
    status: Literal[
        "validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"
    ]
    training_file: str
    validation_file: str | None
    hyperparameters: dict[str, str | int | float]
    method: dict[str, JsonValue]
    result_files: list[str]
    trained_tokens: int | None  # null until the job has succeeded
    seed: int
    metadata: dict[str, str] | None
    error: TuningError | None
    integrations: list[JsonValue]
    evaluation: TrainingEvaluation | None  # null: without ``metric``, or until the job succeeds


class TuningEvent(BaseModel):
    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, JsonValue]


class TuningCheckpoint(BaseModel):
    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, JsonValue]
