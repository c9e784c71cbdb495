"""The record of a fine-tuning job, and its states.

validating_files ──▶ queued ──▶ running ──▶ succeeded
       └───────────────┴───────────┼──▶ failed, cancelled
                                   └──▶ paused ──▶ queued
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from loraplex_adapter_store.report import JsonValue
from loraplex_server.adapters.fine_tuning.training_lines import Method
from loraplex_server.api.request_info import BatchCaller
from loraplex_server.errors import ApiError

Hyperparameters = Mapping[str, str | int | float]


class TuningStatus(Enum):
    VALIDATING = "validating_files"
    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def has_ended(self) -> bool:
        return self in (TuningStatus.SUCCEEDED, TuningStatus.FAILED, TuningStatus.CANCELLED)


@dataclass(frozen=True, slots=True)
class TuningJob:
    """A fine-tuning job. Times are seconds since the epoch."""

    id: str
    caller: BatchCaller  # the API key that made the job, and its tenant
    training_file: str
    validation_file: str | None
    status: TuningStatus
    created: int
    model: str
    method: Method
    hyperparameters: Hyperparameters  # as the client sent them; numbers once the files are read
    seed: int
    fine_tuned_model: str  # the name of the result
    shape: Mapping[str, object]  # ``AdapterShape.settings()``
    adapter: str | None = None  # a further stored name for the result
    metadata: Mapping[str, str] | None = None
    metric: str | None = None  # scores answers of the base and the result; a key of ``METRICS``
    evaluation: Mapping[str, JsonValue] | None = None  # by ``metric``, once the job has succeeded
    finished: int | None = None
    estimated_finish: int | None = None
    error: Mapping[str, str | None] | None = None
    result_files: tuple[str, ...] = ()
    n_tokens: int | None = None  # of the whole run; None until the files are read

    def to_json(self) -> dict[str, object]:
        shown = dict(self.hyperparameters)
        return {
            "id": self.id,
            "object": "fine_tuning.job",
            "created_at": self.created,
            "finished_at": self.finished,
            "estimated_finish": self.estimated_finish if not self.status.has_ended else None,
            "model": self.model,
            "fine_tuned_model": self._when_done(self.fine_tuned_model),
            "organization_id": self.caller.tenant or "loraplex",
            "status": self.status.value,
            "training_file": self.training_file,
            "validation_file": self.validation_file,
            "hyperparameters": shown,
            "method": {"type": self.method, self.method: {"hyperparameters": shown}},
            "result_files": list(self.result_files),
            "trained_tokens": self._when_done(self.n_tokens),
            "seed": self.seed,
            "metadata": self.metadata,
            "error": self.error,
            "integrations": [],
            "evaluation": self.evaluation,
        }

    def _when_done(self, value: object) -> object:
        return value if self.status is TuningStatus.SUCCEEDED else None


def error_of(error: ApiError) -> dict[str, str | None]:
    return {"code": error.code, "message": error.message, "param": error.param}
