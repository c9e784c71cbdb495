"""What is known of a file and of a batch, and the states of a batch.

validating ──▶ in_progress ──▶ finalizing ──▶ completed
    │ ▲            ├──▶ expired, failed
    └─┴────────────┴──▶ cancelling ──▶ cancelled
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from loraplex_server.api.request_info import BatchCaller

__all__ = ["ENDPOINTS", "BatchRecord", "BatchStatus", "FileRecord"]

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


class BatchStatus(Enum):
    VALIDATING = "validating"  # nothing has run yet
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"  # its files are being written
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


@dataclass(frozen=True, slots=True)
class FileRecord:
    id: str
    purpose: str  # batch, or batch_output
    filename: str
    n_bytes: int
    created: int  # seconds since the epoch
    n_lines: int
    endpoints: tuple[str, ...]  # of its lines

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
    id: str
    caller: BatchCaller
    input_file_id: str
    endpoint: str
    metadata: Mapping[str, str] | None
    status: BatchStatus
    times: Mapping[str, int]  # status → when it came, in seconds since the epoch
    created: int
    expires: int
    n_lines: int
    n_completed: int
    n_failed: int
    output_file_id: str | None
    error_file_id: str | None
    problem: str | None  # why it failed as a whole

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
