"""The engine requests of one call for vectors: submitted a few at a time, always ended.

A call of thousands of texts must not fill the engine's queue for all others. If the queue is full,
the call's requests wait here for its own running requests. An engine in this process refuses a
request at once; an engine in another process refuses it with the request's last event.
"""

from collections import deque
from collections.abc import AsyncIterator, Sequence

from torch import Tensor

from loraplex_server.api.serving.text_generation.engine_call import (
    CallContext,
    EngineCall,
    failure_of,
)
from loraplex_server.engine.errors import EngineError, QueueFull
from loraplex_server.engine.requests.client import GenerationRequest
from loraplex_server.engine.requests.events import FinishReason, TokenEvent
from loraplex_server.errors import from_engine

_MAX_SUBMITTED = 32  # requests of one call in the engine


class VectorBatch:
    """The requests of one call, on one event loop.

    Iterate ``results`` once, then ``close`` in a ``finally``.
    """

    def __init__(self, context: CallContext, requests: Sequence[GenerationRequest]) -> None:
        """Takes over the adapter's lease."""
        self._metrics = context.metrics
        self._prompt_param = context.prompt_param
        self._n_tokens = sum(len(request.prompt_ids) for request in requests)
        self._requests = requests
        self._waiting = deque(requests)
        self._index_of = {request.request_id: n for n, request in enumerate(requests)}
        self._n_at_once = _MAX_SUBMITTED  # lower after refusals by an engine in another process
        self._some_ended = False  # since a request was refused without others running
        self._is_admitted = False
        self._closed = False
        self._call = EngineCall(context, self._count)

    async def results(self) -> AsyncIterator[tuple[int, Tensor]]:
        """Yield (index of the request, its vector) on arrival. Raises ApiError."""
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
        """Cancel running requests. Idempotent, never blocks."""
        if self._closed:
            return
        self._closed = True
        self._waiting.clear()
        for _ in self._call.running:
            self._metrics.finished("abort", 0)
        self._call.close()

    def _submit(self) -> None:
        """Submit as many requests as may run at once. Raises ApiError."""
        while self._waiting and len(self._call.running) < self._n_at_once:
            request = self._waiting[0]
            try:
                self._call.submit(request)
            except QueueFull as error:
                if self._call.running:  # submitted again when one of them has ended
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
        """Queue a refused request again, after the call's running ones. Return False if none ran.

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
        """Count the tokens of a request, whose only event is the last one."""
        if not self._closed and not isinstance(event.error, QueueFull):
            self._metrics.queued(event.queue_s)

    def _read(self, event: TokenEvent) -> Tensor:
        if event.pooled is None or event.finish is not FinishReason.STOP:
            self._metrics.finished("error", 0)
            raise failure_of(event, self._prompt_param)
        self._metrics.found_in_prefix_cache(event.n_cached)
        self._metrics.finished("stop", 0)
        return event.pooled
