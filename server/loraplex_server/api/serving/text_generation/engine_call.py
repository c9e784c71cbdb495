"""The engine requests of one API call: reserved, submitted, cancelled and released in one place.

    reserve ──► submit … ──► events ──► close

However a call ends (finished, stop string, client gone, error), ``close`` cancels its running
requests. After the last event of the last request, the adapter is released and unused reserved
tokens are given back.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from loraplex_server.adapters.resolving.resolved_adapter import ResolvedAdapter
from loraplex_server.api.middleware.rate_limit import Meter
from loraplex_server.engine.requests.client import EngineClient, GenerationRequest
from loraplex_server.engine.requests.events import FinishReason, TokenEvent
from loraplex_server.errors import ApiError, from_engine
from loraplex_server.metrics.server_metrics import CallMetrics


@dataclass(frozen=True, slots=True)
class CallContext:
    """The surroundings that all engine requests of one API call share."""

    engine: EngineClient
    live: set[EngineCall]  # the running calls of the server, for its shutdown
    adapter: ResolvedAdapter  # released by the EngineCall
    meter: Meter | None  # of the API key
    metrics: CallMetrics
    prompt_param: str  # the field with the prompt, for errors


class EngineCall:
    """The engine requests of one API call, on one event loop. Call ``close`` in a ``finally``."""

    def __init__(self, context: CallContext, count: Callable[[TokenEvent], None]) -> None:
        """Takes over the adapter's lease. ``count`` is called with each event on arrival."""
        self.running: set[str] = set()  # request ids; submitted, last event not seen
        self.events: deque[TokenEvent] = deque()  # for the caller to take, in order
        self.failure: ApiError | None = None
        self._context = context
        self._count = count
        self._n_reserved = 0  # unused tokens of the API key's limit
        self._arrived = asyncio.Event()
        self._all_submitted = False
        self._closed = False
        self._released = False
        context.live.add(self)

    async def reserve(self, n_tokens: int) -> None:
        """Reserve the most tokens that the call may use. Raises ApiError (429)."""
        if self._context.meter is not None:
            await self._context.meter.reserve_tokens(n_tokens)
            self._n_reserved = n_tokens

    def spend(self, n_tokens: int) -> None:
        """Mark reserved tokens as used."""
        self._n_reserved -= n_tokens

    def submit(self, request: GenerationRequest) -> None:
        """Raises EngineError; the request then does not run."""
        self._context.engine.submit(request, self._on_event)
        self.running.add(request.request_id)

    def all_submitted(self) -> None:
        """Let the last event release the adapter. Without this call, ``close`` does."""
        self._all_submitted = True
        self._release_when_ended()

    def cancel(self, request_id: str) -> None:
        """Cancel a request unless it has ended."""
        if request_id in self.running:
            self._context.engine.cancel(request_id)

    async def arrival(self) -> None:
        """Wait until there is an event or a failure."""
        while not self.events and self.failure is None:
            self._arrived.clear()
            await self._arrived.wait()

    def fail(self, error: ApiError) -> None:
        """End the call with ``error``, for a shutdown whose deadline has passed."""
        self.failure = self.failure or error
        self._arrived.set()

    def close(self) -> None:
        """Cancel running requests. Idempotent, never blocks."""
        if self._closed:
            return
        self._closed = True
        self._context.live.discard(self)
        for request_id in list(self.running):
            self._context.engine.cancel(request_id)
        self.all_submitted()

    def _on_event(self, event: TokenEvent) -> None:
        """The engine's listener. Called on the event loop for each event, so it must be quick."""
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
        self._context.adapter.release()
        if self._context.meter is not None:
            self._context.meter.give_back_tokens(self._n_reserved)


def failure_of(event: TokenEvent, prompt_param: str) -> ApiError:
    """Return the error of a last event that is an error or a cancellation."""
    if event.finish is FinishReason.CANCELLED:
        return ApiError(503, "the request was cancelled", code="cancelled")
    if event.error is None:
        return ApiError(500, "the engine failed without saying why", code="engine_error")
    return from_engine(event.error, prompt_param=prompt_param)
