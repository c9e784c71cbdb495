"""The records of files and batches, and the states of a batch.

validating ──▶ in_progress ──▶ finalizing ──▶ completed
    │ ▲            ├──▶ expired, failed
    └─┴────────────┴──▶ cancelling ──▶ cancelled
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from loraplex_server.api.request_info import BatchCaller


class BatchStatus(Enum):
    """The state of a batch."""

    VALIDATING = "validating"  # nothing has run yet
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"  # the files of answers are being written
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"

    @property
    def has_ended(self) -> bool:
        return self in _ENDED


_ENDED = frozenset(
    {BatchStatus.COMPLETED, BatchStatus.FAILED, BatchStatus.EXPIRED, BatchStatus.CANCELLED}
)


IMAGE_PURPOSES = ("vision", "user_data")


class InputSummary(NamedTuple):
    """The contents of an uploaded file."""

    n_lines: int  # without blank lines; 0 for an image
    # A training file has the method that its lines are for here, and an image its media type.
    endpoints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file of calls, of answers, for training, of a training's metrics, or an image."""

    id: str
    purpose: str  # batch, batch_output, fine-tune, fine-tune-results, or of ``IMAGE_PURPOSES``
    filename: str
    n_bytes: int
    created: int  # seconds since the epoch
    n_lines: int
    endpoints: tuple[str, ...]  # see ``InputSummary``

    @property
    def media_type(self) -> str:
        if self.purpose in IMAGE_PURPOSES:
            return self.endpoints[0]
        return "text/csv" if self.purpose == "fine-tune-results" else "application/jsonl"

    def to_json(self) -> dict[str, object]:
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.n_bytes,
            "created_at": self.created,
            "filename": self.filename,
            "purpose": self.purpose,
            "status": "processed",
        }


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """The stored state of a batch."""

    id: str
    caller: BatchCaller
    input_file_id: str
    endpoint: str
    metadata: Mapping[str, str] | None
    status: BatchStatus
    times: Mapping[str, int]  # status → its start, in seconds since the epoch
    created: int
    expires: int
    n_lines: int
    n_completed: int
    n_failed: int
    output_file_id: str | None
    error_file_id: str | None
    problem: str | None  # the reason why the whole batch failed

    def to_json(self) -> dict[str, object]:
        problem = None
        if self.problem is not None:
            error = {"code": "batch_failed", "message": self.problem, "line": None, "param": None}
            problem = {"object": "list", "data": [error]}
        times = {f"{status.value}_at": self.times.get(status.value) for status in _SHOWN_TIMES}
        return {
            "id": self.id,
            "object": "batch",
            "endpoint": self.endpoint,
            "errors": problem,
            "input_file_id": self.input_file_id,
            "completion_window": "24h",
            "status": self.status.value,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "created_at": self.created,
            "expires_at": self.expires,
            **times,
            "request_counts": {
                "total": self.n_lines,
                "completed": self.n_completed,
                "failed": self.n_failed,
            },
            "metadata": self.metadata,
        }


_SHOWN_TIMES = tuple(status for status in BatchStatus if status is not BatchStatus.VALIDATING)
