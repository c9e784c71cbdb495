"""Events of one request between the engine's listener and the stream that carries them away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from loraplex_server.engine.events import TokenEvent

__all__ = ["EventBuffer"]


class EventBuffer:
    """Event loop only. ``put`` is a listener of the engine; ``lists`` is iterated once."""

    def __init__(self) -> None:
        self._events: list[TokenEvent] = []
        self._arrived = asyncio.Event()
        self._ended = asyncio.Event()

    def put(self, event: TokenEvent) -> None:
        self._events.append(event)
        self._arrived.set()
        if event.finish is not None:
            self._ended.set()

    async def lists(self, gap_s: float) -> AsyncIterator[list[TokenEvent]]:
        """What arrived, the first at once, then at most one list every ``gap_s`` seconds.

        Each list costs a trip between processes, whatever is in it. The last one ends with the
        last event and waits for nothing.
        """
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            taken, self._events = self._events, []
            yield taken
            if taken[-1].finish is not None:
                return
            try:
                await asyncio.wait_for(self._ended.wait(), gap_s)
            except TimeoutError:
                continue
