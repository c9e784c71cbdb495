"""GET /v1/models."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, JsonValue

__all__ = ["Model", "ModelList"]


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    quantization: str | None = None  # of the base's linears, as "int8"
    permission: list[JsonValue]


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]
