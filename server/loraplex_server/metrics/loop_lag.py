"""How late the event loop runs what is due: every answer and stream waits as long."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry, Histogram

__all__ = ["LoopLag"]

_EVERY_S = 0.1
_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class LoopLag:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._seconds = Histogram(
            "loraplex_event_loop_lag_seconds",
            "How late the event loop ran what was due, ten times a second.",
            buckets=_SECONDS,
            registry=registry,
        )

    async def watch(self) -> None:
        """Runs until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _EVERY_S
            await asyncio.sleep(_EVERY_S)
            self._seconds.observe(max(0.0, loop.time() - due))
