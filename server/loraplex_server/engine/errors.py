"""Errors of the engine.

EngineError
├── QueueFull          the bounded queue is full: try again later
├── EngineDraining     the server is going down: try another replica
├── ContextOverflow    prompt + max_tokens cannot fit the context or the KV memory
├── GrammarTooComplex  a step of the request's grammar takes more than is allowed
├── NoTokenAllowed     the request's own fields forbid every token
├── AdapterUnservable  the plan cannot be placed (too large for the pool, unsupported part)
├── AdapterLoadFailed  the copy to the device failed: try again
├── NoAdapterPlace     the device is taken by pinned adapters: unpin one
├── RankLost           the engine's processes are not in step any more: it dies of it
└── EngineDead         the engine thread stopped: nothing can be served
"""

from __future__ import annotations

__all__ = [
    "AdapterLoadFailed",
    "AdapterUnservable",
    "ContextOverflow",
    "EngineDead",
    "EngineDraining",
    "EngineError",
    "GrammarTooComplex",
    "NoAdapterPlace",
    "NoTokenAllowed",
    "QueueFull",
    "RankLost",
]


class EngineError(Exception):
    """Base of all errors raised or delivered by the engine."""


class QueueFull(EngineError):
    """Carries ``retry_after_s``, an estimate from the queue's length and the recent rate."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type[QueueFull], tuple[str, float]]:
        return QueueFull, (str(self), self.retry_after_s)  # it crosses processes in a cluster


class EngineDraining(EngineError):
    pass


class ContextOverflow(EngineError):
    pass


class GrammarTooComplex(EngineError):
    pass


class NoTokenAllowed(EngineError):
    """Carries ``param``, the field that forbids what the others leave."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[type[NoTokenAllowed], tuple[str, str]]:
        return NoTokenAllowed, (str(self), self.param)


class AdapterUnservable(EngineError):
    pass


class AdapterLoadFailed(EngineError):
    pass


class NoAdapterPlace(EngineError):
    pass


class RankLost(EngineError):
    pass


class EngineDead(EngineError):
    pass
