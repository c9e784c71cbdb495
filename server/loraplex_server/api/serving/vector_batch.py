"""The engine requests of one call for vectors: submitted a few at a time, always ended.

A call of thousands of texts must not fill the engine's queue for everybody else. One that meets a
full queue has its requests wait here for those of its own that run. An engine in this process says
so at once, one elsewhere with the request's last event.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Sequence

from torch import Tensor

from loraplex_server.adapters.resolver import ResolvedAdapter
from loraplex_server.api.errors import from_engine
from loraplex_server.api.middleware.rate_limit import Meter
from loraplex_server.engine.client import EngineClient, GenerationRequest
from loraplex_server.engine.errors import EngineError, QueueFull
from loraplex_server.engine.events import FinishReason, TokenEvent
from loraplex_server.metrics.server_metrics import CallMetrics

from .engine_call import EngineCall, LiveCalls, failure_of

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
        live: LiveCalls,
        metrics: CallMetrics,
        meter: Meter | None,
        prompt_param: str,
    ) -> None:
        """Takes over ``chosen`` and releases it once nothing runs any more."""
        self._metrics = metrics
        self._prompt_param = prompt_param
        self._n_tokens = sum(len(request.prompt_ids) for request in requests)
        self._requests = requests
        self._waiting = deque(requests)
        self._index_of = {request.request_id: n for n, request in enumerate(requests)}
        self._n_at_once = _MAX_SUBMITTED  # fewer once an engine elsewhere has refused some
        self._some_ended = False  # since a request was refused while no other one ran
        self._is_admitted = False
        self._closed = False
        self._call = EngineCall(engine, chosen=chosen, live=live, meter=meter, count=self._count)

    async def results(self) -> AsyncIterator[tuple[int, Tensor]]:
        """(index of the request, what it asked for), as they come. Raises ApiError."""
        await self._call.reserve(self._n_tokens)
        self._submit()
        while self._call.running or self._call.events or self._waiting:
            await self._call.arrival()
            if not self._call.events and self._call.failure is not None:
                raise self._call.failure
            event = self._call.events.popleft()
            if isinstance(event.error, QueueFull) and self._put_back(event):
                continue
            pooled = self._read(event)
            self._some_ended = True
            self._n_at_once = min(self._n_at_once + 1, _MAX_SUBMITTED)
            self._submit()
            yield self._index_of[event.request_id], pooled

    def close(self) -> None:
        """Cancels what still runs. Idempotent, never blocks."""
        if self._closed:
            return
        self._closed = True
        self._waiting.clear()
        for _ in self._call.running:
            self._metrics.finished("abort", 0)
        self._call.close()

    def _submit(self) -> None:
        """As many as may be under way. Raises ApiError."""
        while self._waiting and len(self._call.running) < self._n_at_once:
            request = self._waiting[0]
            try:
                self._call.submit(request)
            except QueueFull as error:
                if self._call.running:  # its own requests are waited for, and then tried again
                    return
                raise from_engine(error, prompt_param=self._prompt_param) from error
            except EngineError as error:
                raise from_engine(error, prompt_param=self._prompt_param) from error
            self._waiting.popleft()
            if not self._is_admitted:
                self._is_admitted = True
                self._metrics.admitted()
            self._call.spend(len(request.prompt_ids))

    def _put_back(self, event: TokenEvent) -> bool:
        """Whether the refused request is tried again: after others of the call, which ran by then.

        Raises ApiError.
        """
        others = bool(self._call.running or self._call.events)
        if not others and not self._some_ended:
            return False
        request = self._requests[self._index_of[event.request_id]]
        self._waiting.appendleft(request)
        self._call.spend(-len(request.prompt_ids))
        self._n_at_once = max(1, len(self._call.running))
        if not others:
            self._some_ended = False
            self._submit()
        return True

    def _count(self, event: TokenEvent) -> None:
        """Of such a request there is one event, the last."""
        if not self._closed and not isinstance(event.error, QueueFull):
            self._metrics.queued(event.queue_s)

    def _read(self, event: TokenEvent) -> Tensor:
        if event.pooled is None or event.finish is not FinishReason.STOP:
            self._metrics.finished("error", 0)
            raise failure_of(event, self._prompt_param)
        self._metrics.found_in_prefix_cache(event.n_cached)
        self._metrics.finished("stop", 0)
        return event.pooled
