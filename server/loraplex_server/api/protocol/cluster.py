"""GET /v1/cluster."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from .activity import Share

__all__ = ["ClusterAnswer"]


class HeldAdapter(BaseModel):
    name: str  # or the beginning of its digest
    digest: str
    tier: Literal["device", "host"]
    running: int  # requests
    waiting: int
    requests: int  # taken since the replica's start


class MemoryShares(BaseModel):
    device: Share
    host: Share


class EngineProcess(BaseModel):
    replica: str  # the label of /metrics
    alive: bool  # its engine runs and moves
    running: int  # requests
    waiting: int
    rows: Share  # of a step, one for each running request
    steps: int
    step_age_s: float
    preemptions: int
    kv_pages: Share
    bytes: MemoryShares  # of adapters
    slots: int  # adapters that fit the device
    loads: int  # of adapters to the device, since its start
    evictions: int
    adapters: list[HeldAdapter]  # those on the device first, some hundreds at most


class FrontProcess(BaseModel):
    replica: str
    role: Literal["gateway", "desk"]
    calls: int  # for text and vectors, that run there
    answers: bool  # this request


class Cluster(BaseModel):
    name: str  # of Ray's application
    age_s: float  # of what engines said
    engines: list[EngineProcess]
    fronts: list[FrontProcess]


class ClusterAnswer(BaseModel):
    object: Literal["cluster"]
    cluster: Cluster | None  # null: the server is one process
