"""/v1/files and /v1/batches, as OpenAI has them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from .body import Body, LimitedDict, Name

__all__ = [
    "FILE_SCHEMA",
    "Batch",
    "BatchBody",
    "BatchList",
    "DeletedFile",
    "File",
    "FileList",
]

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/embeddings"]
_Key = Annotated[str, Field(max_length=64)]
_Value = Annotated[str, Field(max_length=512)]
_N_METADATA = 16

FILE_SCHEMA = {  # of the form, for /openapi.json
    "type": "object",
    "required": ["file", "purpose"],
    "additionalProperties": False,
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": ["batch"]},
    },
}


class BatchBody(Body):
    input_file_id: Name
    endpoint: Endpoint
    completion_window: Literal["24h"]
    metadata: (
        Annotated[dict[_Key, _Value], LimitedDict(_N_METADATA), Field(max_length=_N_METADATA)]
        | None
    ) = None


class File(BaseModel):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]


class _Page(BaseModel):
    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileList(_Page):
    data: list[File]


class DeletedFile(BaseModel):
    id: str
    object: Literal["file"]
    deleted: Literal[True]


class _Problem(BaseModel):
    code: str
    message: str
    line: int | None
    param: str | None


class _Problems(BaseModel):
    object: Literal["list"]
    data: list[_Problem]


class _Counts(BaseModel):
    total: int
    completed: int
    failed: int


class Batch(BaseModel):
    """The times are in seconds since the epoch."""

    model_config = ConfigDict(title="Batch")

    id: str
    object: Literal["batch"]
    endpoint: Endpoint
    errors: _Problems | None
    input_file_id: str
    completion_window: Literal["24h"]
    status: Literal[
        "validating",
        "in_progress",
        "finalizing",
        "completed",
        "failed",
        "expired",
        "cancelling",
        "cancelled",
    ]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: _Counts
    metadata: dict[str, str] | None


class BatchList(_Page):
    data: list[Batch]
