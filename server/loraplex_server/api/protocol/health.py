"""GET /health, /ready, /ping and /version."""

from typing import Literal

from pydantic import BaseModel


class DegradedPart(BaseModel):
    part: str
    problem: str  # kind of the last failure
    since: int  # first failure since the part last worked, in seconds since the epoch
    failures: int  # since then


class LostKernels(BaseModel):
    """Steps with these layers run slower, since a kernel failed when the server started."""

    what: Literal["kernels", "graphs"]
    layers: Literal["base", "lora", "routed_mlp"]
    problem: str  # the function and the kind of its error


class Status(BaseModel):
    status: Literal["ok", "degraded", "ready"]
    degraded: list[DegradedPart] | None = None  # parts that keep failing
    lost_at_start: list[LostKernels] | None = None
    full_queues: int | None = None  # tenants whose further requests get a 429


class Features(BaseModel):
    """The features that this server was started with."""

    generate: bool  # adapters from a sentence
    learn: bool  # from a sentence and examples
    train: bool  # POST /v1/adapters/train
    route: bool  # "auto"
    cluster: bool  # several processes: GET /v1/cluster
    images: bool  # images in chats
    guide: bool  # the documentation at /guide


class Version(BaseModel):
    version: str
    features: Features
    may_change: bool  # the caller may add, change and remove adapters
    sees_all: bool  # the caller may read GET /v1/live and /v1/cluster
