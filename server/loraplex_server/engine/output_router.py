"""The way back from the engine thread to the event loops."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from .client import Listener
from .events import TokenEvent
from .request import Request

__all__ = ["OutputRouter"]

_log = logging.getLogger(__name__)


class OutputRouter:
    """Delivers events in order, one wake-up per event loop and step. Engine thread only."""

    def __init__(self) -> None:
        self._pending: list[tuple[asyncio.AbstractEventLoop, Listener, TokenEvent]] = []

    def put(self, request: Request, event: TokenEvent) -> None:
        if request.loop is not None:
            self._pending.append((request.loop, request.listener, event))

    def flush(self) -> None:
        """Hands over what was put since the last flush. A closed loop loses only its own events."""
        pending, self._pending = self._pending, []
        for loop in {loop for loop, _, _ in pending}:
            mine = [(listener, event) for other, listener, event in pending if other is loop]
            try:
                loop.call_soon_threadsafe(_deliver, mine)
            except RuntimeError:  # the loop is closed: its clients are gone
                continue


def _deliver(events: Sequence[tuple[Listener, TokenEvent]]) -> None:
    for listener, event in events:
        try:
            listener(event)
        except Exception:  # its own request hangs on it, the others' must not
            _log.exception("the listener of request %s failed", event.request_id)
