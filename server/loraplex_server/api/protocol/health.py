"""GET /health, /ready, /ping and /version."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

__all__ = ["Status", "Version"]


class Status(BaseModel):
    status: Literal["ok", "ready"]


class Version(BaseModel):
    version: str
