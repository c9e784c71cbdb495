"""GET /health, /ready, /ping and /version."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

__all__ = ["DegradedPart", "Status", "Version"]


class DegradedPart(BaseModel):
    part: str
    problem: str  # the kind of its last failure
    since: int  # of the first failure since it last worked, in seconds since the epoch
    failures: int  # since then


class Status(BaseModel):
    status: Literal["ok", "degraded", "ready"]
    degraded: list[DegradedPart] | None = None  # parts that keep failing
    full_queues: int | None = None  # of tenants; more of their requests get a 429


class Features(BaseModel):
    """What this server was started with; the console shows what there is."""

    generate: bool  # adapters from a sentence
    learn: bool  # from a sentence and examples
    train: bool  # POST /v1/adapters/train
    route: bool  # "auto"
    cluster: bool  # several processes: GET /v1/cluster
    guide: bool  # the documentation at /guide


class Version(BaseModel):
    version: str
    features: Features
    may_change: bool  # whether the caller may add, change and remove adapters
    sees_all: bool  # whether it may see what all do: GET /v1/live and /v1/cluster
