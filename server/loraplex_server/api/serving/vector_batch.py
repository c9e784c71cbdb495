"""The engine requests of one call for vectors: submitted a few at a time, always ended.

A call of thousands of texts must not fill the engine's queue for everybody else.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence

from torch import Tensor

from loraplex_server.adapters.resolver import ResolvedAdapter
from loraplex_server.api.errors import ApiError, from_engine
from loraplex_server.api.middleware.rate_limit import RateLimiter
from loraplex_server.engine.client import EngineClient, GenerationRequest
from loraplex_server.engine.errors import EngineError, QueueFull
from loraplex_server.engine.events import FinishReason, TokenEvent
from loraplex_server.metrics.server_metrics import CallMetrics

from .generation import LiveGenerations, failure_of

__all__ = ["VectorBatch"]

_MAX_SUBMITTED = 32  # of one call, at once


class VectorBatch:
    """Lives on one event loop. Iterate ``results`` once; then ``close``, in a ``finally``."""

    def __init__(
        self,
        engine: EngineClient,
        requests: Sequence[GenerationRequest],
        *,
        chosen: ResolvedAdapter,
        live: LiveGenerations,
        metrics: CallMetrics,
        meter: RateLimiter | None,
        prompt_param: str,
    ) -> None:
        """Takes over ``chosen`` and releases it once nothing runs any more."""
        self._engine = engine
        self._chosen = chosen
        self._live = live
        self._metrics = metrics
        self._meter = meter
        self._n_reserved = 0  # tokens of the API key's limit that were not used yet
        self._prompt_param = prompt_param
        self._waiting = deque(enumerate(requests))
        self._running: dict[str, int] = {}  # request id → index; its event has not come
        self._events: deque[tuple[int, TokenEvent]] = deque()  # not read yet
        self._arrived = asyncio.Event()
        self._failure: ApiError | None = None
        self._is_admitted = False
        self._closed = False
        live.add(self)

    async def results(self) -> AsyncIterator[tuple[int, Tensor]]:
        """(index of the request, what it asked for), as they come. Raises ApiError."""
        if self._meter is not None:
            n_tokens = sum(len(request.prompt_ids) for _, request in self._waiting)
            self._meter.reserve_tokens(n_tokens)
            self._n_reserved = n_tokens
        self._submit()
        while self._running or self._events or self._waiting:
            while not self._events:
                if self._failure is not None:
                    raise self._failure
                self._arrived.clear()
                await self._arrived.wait()
            index, event = self._events.popleft()
            pooled = self._read(event)
            self._submit()
            yield index, pooled

    def fail(self, error: ApiError) -> None:
        """Ends the results with ``error``; for a shutdown that cannot wait any longer."""
        self._failure = self._failure or error
        self._arrived.set()

    def close(self) -> None:
        """Cancels what still runs. Idempotent, never blocks."""
        if self._closed:
            return
        self._closed = True
        self._live.discard(self)
        self._waiting.clear()
        if self._meter is not None:
            self._meter.give_back_tokens(self._n_reserved)
        for request_id in self._running:
            self._metrics.finished("abort", 0)
            self._engine.cancel(request_id)
        if not self._running:
            self._chosen.release()

    def _submit(self) -> None:
        """As many as may be under way. Raises ApiError."""
        while self._waiting and len(self._running) < _MAX_SUBMITTED:
            index, request = self._waiting[0]
            try:
                self._engine.submit(request, self._on_event)
            except QueueFull as error:
                if self._running:  # its own requests are waited for, and then tried again
                    return
                raise from_engine(error, prompt_param=self._prompt_param) from error
            except EngineError as error:
                raise from_engine(error, prompt_param=self._prompt_param) from error
            self._waiting.popleft()
            self._running[request.request_id] = index
            if not self._is_admitted:
                self._is_admitted = True
                self._metrics.admitted()
            self._n_reserved -= len(request.prompt_ids)

    def _on_event(self, event: TokenEvent) -> None:
        """Of such a request there is one event, the last."""
        index = self._running.pop(event.request_id)
        if self._closed:
            if not self._running:
                self._chosen.release()
            return
        self._metrics.queued(event.queue_s)
        self._events.append((index, event))
        self._arrived.set()

    def _read(self, event: TokenEvent) -> Tensor:
        if event.pooled is None or event.finish is not FinishReason.STOP:
            self._metrics.finished("error", 0)
            raise failure_of(event, self._prompt_param)
        self._metrics.found_in_prefix_cache(event.n_cached)
        self._metrics.finished("stop", 0)
        return event.pooled
