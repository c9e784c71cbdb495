"""Request bodies for the OpenAPI page; they are parsed by hand, so FastAPI cannot know them."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

__all__ = ["body_of"]


def body_of(model: type[BaseModel]) -> dict[str, Any]:  # FastAPI's own type for openapi_extra
    schema = model.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
