"""GET /v1/live and GET /v1/requests."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

__all__ = ["Live", "RequestList"]


class Call(BaseModel):
    """A call for text or vectors. Seconds are null while they are not known."""

    id: str
    path: str
    tenant: str | None
    started: float  # seconds since the epoch
    state: Literal["waiting", "answering", "ended", "failed"]  # waiting: no token yet
    adapter: str | None  # ``name@digest`` or ``base``; null: none was found
    chosen_by: Literal["base", "name", "mixture", "auto", "description"]
    n_choices: int
    prompt_tokens: int
    output_tokens: int
    load_s: float | None  # waited for the adapter
    queue_s: float | None
    first_token_s: float | None
    seconds: float | None
    status: int | None
    error: str | None
    prompt: str | None  # its beginning, where the operator allows it: --show-prompts


class RequestList(BaseModel):
    object: Literal["list"]
    running: list[Call]
    data: list[Call]  # the last that ended, newest first


class Share(BaseModel):
    used: int
    total: int | None


class EngineState(BaseModel):
    alive: bool
    running: int
    waiting: int
    steps: int
    step_age_s: float
    preemptions: int
    kv_pages: Share


class TokenRates(BaseModel):
    prompt: float
    output: float


class Percentiles(BaseModel):
    """Of the last minute."""

    n: int
    p50: float | None
    p95: float | None
    p99: float | None


class AdapterTiers(BaseModel):
    registered: int
    device: list[str]
    slots: int
    host: int
    loads: int
    evictions: int
    mean_load_s: float


class TierShares(BaseModel):
    device: Share
    host: Share
    disk: Share


class Move(BaseModel):
    time: float
    kind: Literal["loaded", "evicted"]
    adapter: str


class Live(BaseModel):
    object: Literal["live"]
    time: float
    engine: EngineState
    tokens_per_s: TokenRates
    first_token_s: Percentiles
    gap_s: Percentiles
    adapters: AdapterTiers
    bytes: TierShares
    rows: list[Call]  # calls that run, oldest first
    moves: list[Move]  # adapters that came to the device or left it, as somebody watched
