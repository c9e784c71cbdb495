"""Errors of the engine.

EngineError
├── QueueFull          the bounded queue is full: try again later
├── EngineDraining     the server is going down: try another replica
├── ContextOverflow    prompt + max_tokens cannot fit the context or the KV memory
├── GrammarTooComplex  a step of the request's grammar exceeds its limits
├── NoTokenAllowed     the request's own fields forbid every token
├── AdapterUnservable  the adapter is too large for the pool or has an unsupported part
├── AdapterLoadFailed  the copy to the device failed: try again
├── NoAdapterSlot      pinned adapters take all of the device pool: unpin one
├── RankLost           a rank is gone or out of step: the engine stops
└── EngineDead         the engine thread stopped: nothing can be served
"""

from __future__ import annotations


class EngineError(Exception):
    """Base of all errors raised or delivered by the engine."""


class QueueFull(EngineError):
    """The queue is full. ``retry_after_s`` is estimated from its length and the recent rate."""

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
    """The request's fields leave no token. ``param`` is the field that forbids the last ones."""

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param

    def __reduce__(self) -> tuple[type[NoTokenAllowed], tuple[str, str]]:
        return NoTokenAllowed, (str(self), self.param)


class AdapterUnservable(EngineError):
    pass


class AdapterLoadFailed(EngineError):
    pass


class NoAdapterSlot(EngineError):
    pass


class RankLost(EngineError):
    pass


class EngineDead(EngineError):
    pass
