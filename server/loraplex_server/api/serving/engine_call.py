"""The engine requests of one API call: reserved, submitted, cancelled and released in one place.

    reserve ──► submit … ──► events ──► close

However a call ends (finished, stop string, client gone, error), ``close`` cancels what still runs.
The adapter is released, and what was reserved but not used is given back, once the engine has
reported the last event of each request and none is to come.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from loraplex_server.adapters.resolver import ResolvedAdapter
from loraplex_server.api.errors import ApiError, from_engine
from loraplex_server.api.middleware.rate_limit import Meter
from loraplex_server.engine.client import EngineClient, GenerationRequest
from loraplex_server.engine.events import FinishReason, TokenEvent

__all__ = ["EngineCall", "LiveCalls", "failure_of"]


class LiveCalls:
    """All that runs for clients, so that a shutdown can end each with an error."""

    def __init__(self) -> None:
        self._live: set[EngineCall] = set()

    def __len__(self) -> int:
        return len(self._live)

    def add(self, call: EngineCall) -> None:
        self._live.add(call)

    def discard(self, call: EngineCall) -> None:
        self._live.discard(call)

    def fail_all(self, error: ApiError) -> None:
        for call in list(self._live):
            call.fail(error)


class EngineCall:
    """Lives on one event loop, from its making to ``close``, which belongs in a ``finally``."""

    def __init__(
        self,
        engine: EngineClient,
        *,
        chosen: ResolvedAdapter,
        live: LiveCalls,
        meter: Meter | None,
        count: Callable[[TokenEvent], None],
    ) -> None:
        """Takes over ``chosen`` and releases it. ``count`` sees each event as it comes."""
        self.running: set[str] = set()  # request ids; submitted, last event not seen
        self.events: deque[TokenEvent] = deque()  # for the caller to take, in order
        self.failure: ApiError | None = None
        self._engine = engine
        self._chosen = chosen
        self._live = live
        self._meter = meter
        self._count = count
        self._n_reserved = 0  # tokens of the API key's limit that were not used yet
        self._arrived = asyncio.Event()
        self._all_submitted = False
        self._closed = False
        self._released = False
        live.add(self)

    async def reserve(self, n_tokens: int) -> None:
        """What the call may take at most. Raises ApiError (429), and then takes nothing."""
        if self._meter is not None:
            await self._meter.reserve_tokens(n_tokens)
            self._n_reserved = n_tokens

    def spend(self, n_tokens: int) -> None:
        """Of what is reserved: it is not given back."""
        self._n_reserved -= n_tokens

    def submit(self, request: GenerationRequest) -> None:
        """Raises EngineError, and then this request does not run."""
        self._engine.submit(request, self._on_event)
        self.running.add(request.request_id)

    def all_submitted(self) -> None:
        """After the last ``submit``: the last event lets the adapter go, otherwise ``close``."""
        self._all_submitted = True
        self._release_when_ended()

    def cancel(self, request_id: str) -> None:
        """Nothing happens where it has ended."""
        if request_id in self.running:
            self._engine.cancel(request_id)

    async def arrival(self) -> None:
        """Waits for an event or a failure, unless one is there."""
        while not self.events and self.failure is None:
            self._arrived.clear()
            await self._arrived.wait()

    def fail(self, error: ApiError) -> None:
        """Ends the call with ``error``; for a shutdown that cannot wait any longer."""
        self.failure = self.failure or error
        self._arrived.set()

    def close(self) -> None:
        """Cancels what still runs. Idempotent, never blocks."""
        if self._closed:
            return
        self._closed = True
        self._live.discard(self)
        for request_id in list(self.running):
            self._engine.cancel(request_id)
        self.all_submitted()

    def _on_event(self, event: TokenEvent) -> None:
        """The engine's listener: on the event loop, once for each event, so it must be quick."""
        self._count(event)
        if event.finish is not None:
            self.running.discard(event.request_id)
            self._release_when_ended()
        if not self._closed:
            self.events.append(event)
            self._arrived.set()

    def _release_when_ended(self) -> None:
        if self.running or not self._all_submitted or self._released:
            return
        self._released = True
        self._chosen.release()
        if self._meter is not None:
            self._meter.give_back_tokens(self._n_reserved)


def failure_of(event: TokenEvent, prompt_param: str) -> ApiError:
    """Of a last event that is an error or a cancellation."""
    if event.finish is FinishReason.CANCELLED:
        return ApiError(503, "the request was cancelled", code="cancelled")
    if event.error is None:
        return ApiError(500, "the engine failed without saying why", code="engine_error")
    return from_engine(event.error, prompt_param=prompt_param)
