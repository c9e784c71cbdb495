"""What other threads ask of the engine thread."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from loraplex_adapter_store.plan import AdapterPlan

from .errors import EngineError
from .request import Request

__all__ = [
    "Cancel",
    "FailAll",
    "Lost",
    "Message",
    "Reply",
    "SetPinned",
    "Stop",
    "Submit",
    "Unload",
    "Wake",
    "Warm",
]


@dataclass(frozen=True, slots=True)
class Reply:
    """Where an answer goes. ``send`` works from any thread; on a closed loop it does nothing."""

    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[int]

    def send(self, value: int) -> None:
        try:
            self.loop.call_soon_threadsafe(self._set, value)
        except RuntimeError:  # the loop is closed
            return

    def _set(self, value: int) -> None:
        if not self.future.done():
            self.future.set_result(value)


@dataclass(frozen=True, slots=True)
class Submit:
    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    request_id: str


@dataclass(frozen=True, slots=True)
class SetPinned:
    digest: str
    pinned: bool


@dataclass(frozen=True, slots=True)
class Warm:
    plan: AdapterPlan


@dataclass(frozen=True, slots=True)
class Unload:
    digest: str
    freed_bytes: Reply


@dataclass(frozen=True, slots=True)
class FailAll:
    """Ends every request that is there."""

    error: EngineError


@dataclass(frozen=True, slots=True)
class Lost:
    """A process of the engine has died, and with it the engine."""

    why: str


@dataclass(frozen=True, slots=True)
class Wake:
    """Nothing to do but a step: a load is done."""


@dataclass(frozen=True, slots=True)
class Stop:
    pass


Message = Submit | Cancel | SetPinned | Warm | Unload | FailAll | Lost | Wake | Stop
