"""One API call's engine requests: submitted together, merged to ordered deltas, always ended.

    submit ──► listener (event loop) ──► deltas() ──► route
                 counts, timestamps       text, stop strings, order of first chunks

However a call ends (finished, stop string, client gone, error), ``close`` cancels what still
runs, and the adapter's lease is released once the engine has reported the last event of each.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from time import perf_counter
from typing import NamedTuple, Protocol

from tokenizers import Tokenizer

from loraplex_server.adapters.resolver import ResolvedAdapter
from loraplex_server.api.errors import ApiError, from_engine
from loraplex_server.api.middleware.rate_limit import RateLimiter
from loraplex_server.engine.client import EngineClient
from loraplex_server.engine.errors import EngineError
from loraplex_server.engine.events import FinishReason, TokenEvent
from loraplex_server.metrics.server_metrics import CallMetrics

from .choice import Choice, ChoiceDelta, ChoiceRequest, CollectedChoice

__all__ = ["Generation", "LiveCall", "LiveGenerations", "Usage", "failure_of"]


class Usage(NamedTuple):
    n_prompt: int
    n_output: int
    n_cached: int

    def to_json(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.n_prompt,
            "completion_tokens": self.n_output,
            "total_tokens": self.n_prompt + self.n_output,
            "prompt_tokens_details": {"cached_tokens": self.n_cached},
        }


class LiveCall(Protocol):
    """What runs in the engine for one call. Hashable by identity."""

    def fail(self, error: ApiError) -> None:
        """Ends it with ``error``."""


class LiveGenerations:
    """All that runs for clients, so that a shutdown can end each with an error."""

    def __init__(self) -> None:
        self._live: set[LiveCall] = set()

    def __len__(self) -> int:
        return len(self._live)

    def add(self, call: LiveCall) -> None:
        self._live.add(call)

    def discard(self, call: LiveCall) -> None:
        self._live.discard(call)

    def fail_all(self, error: ApiError) -> None:
        for call in list(self._live):
            call.fail(error)


class Generation:
    """Lives on one event loop. Submits in ``start``; iterate ``deltas`` once; then ``close``."""

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        choices: Sequence[ChoiceRequest],
        *,
        chosen: ResolvedAdapter,
        live: LiveGenerations,
        metrics: CallMetrics,
        meter: RateLimiter | None,
        prompt_param: str,
        n_prompt_tokens: int,
    ) -> None:
        """Takes over ``chosen`` and releases it. ``n_prompt_tokens``: each prompt counted once."""
        self._engine = engine
        self._chosen = chosen
        self._live = live
        self._metrics = metrics
        self._meter = meter
        self._prompt_param = prompt_param
        self._n_prompt_tokens = n_prompt_tokens
        self._n_reserved = 0  # tokens of the API key's limit that were not used yet
        self._choices = [Choice(i, spec, tokenizer) for i, spec in enumerate(choices)]
        self._by_id = {choice.request_id: choice for choice in self._choices}
        self._last_token_at: dict[str, float] = {}
        self._unfinished: set[str] = set()  # submitted, last event not seen
        self._events: deque[TokenEvent] = deque()
        self._cached: dict[tuple[int, ...], int] = {}  # prompt → tokens from the prefix cache
        self._failure: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._submitting = False
        self._is_admitted = False
        self._closed = False
        self._released = False

    def start(self) -> None:
        """Submits every choice, or none: raises ApiError and then holds nothing any more."""
        self._live.add(self)
        self._submitting = True
        try:
            self._reserve()
            for request_id, choice in self._by_id.items():
                self._engine.submit(choice.spec.request, self._on_event)
                self._unfinished.add(request_id)
            self._is_admitted = True
            self._metrics.admitted()
            self._n_reserved -= self._n_prompt_tokens
        except EngineError as error:
            raise from_engine(error, prompt_param=self._prompt_param) from error
        finally:
            self._submitting = False
            if not self._is_admitted:
                self.close()

    @property
    def usage(self) -> Usage:
        n_output = sum(c.n_output for c in self._choices if not c.spec.discard_output)
        return Usage(self._n_prompt_tokens, n_output, sum(self._cached.values()))

    async def deltas(self) -> AsyncIterator[list[ChoiceDelta]]:
        """Yields what arrived since the last time. First deltas come in the order of indices.

        Raises ApiError when a choice failed; deltas that came before it are yielded first.
        """
        n_open = len(self._choices)
        waiting: dict[int, list[ChoiceDelta]] = {}  # deltas of choices whose turn has not come
        turn = 0  # choices below it have shown their first delta
        while n_open:
            ready: list[ChoiceDelta] = []
            while self._events:
                delta = self._digest(self._events.popleft())
                if delta is None:
                    continue
                n_open -= delta.finish_reason is not None
                if delta.index > turn:
                    waiting.setdefault(delta.index, []).append(delta)
                    continue
                ready.append(delta)
                if delta.index == turn:
                    turn += 1
                    while turn in waiting:
                        ready += waiting.pop(turn)
                        turn += 1
            if ready:
                yield ready
            if self._failure is not None and n_open:
                raise self._failure
            if n_open and not self._events:
                await self._wait()

    async def collect(self) -> list[CollectedChoice]:
        """The whole answer. Raises ApiError."""
        collected = [CollectedChoice(choice.index) for choice in self._choices]
        async for deltas in self.deltas():
            for delta in deltas:
                collected[delta.index].add(delta)
        return collected

    def fail(self, error: ApiError) -> None:
        """Ends the deltas with ``error``; for a shutdown that cannot wait any longer."""
        if self._failure is None:
            self._failure = error
            self._wake()

    def close(self) -> None:
        """Cancels what still runs. Idempotent, never blocks; belongs in a ``finally``."""
        if self._closed:
            return
        self._closed = True
        self._live.discard(self)
        for choice in self._choices if self._is_admitted else ():
            if not choice.ended and choice.request_id in self._unfinished:
                self._metrics.finished("abort", choice.n_output)
        for request_id in list(self._unfinished):
            self._engine.cancel(request_id)
        self._release_when_finished()

    def _on_event(self, event: TokenEvent) -> None:
        """The engine's listener: on the event loop, once per event, so it must be quick."""
        choice = self._by_id[event.request_id]
        now = perf_counter()
        if event.queue_s and self._is_admitted:
            self._metrics.queued(event.queue_s)
        if event.token_ids and not choice.ended and self._is_admitted:
            previous = self._last_token_at.get(event.request_id)
            self._metrics.tokens(len(event.token_ids), now, previous=previous)
            self._n_reserved -= len(event.token_ids)
            self._last_token_at[event.request_id] = now
        if event.finish is not None:
            self._unfinished.discard(event.request_id)
            self._release_when_finished()
        if not self._closed:
            self._events.append(event)
            self._wake()

    def _reserve(self) -> None:
        """What this call may take at most. Raises ApiError."""
        if self._meter is not None:
            n_output = sum(choice.spec.request.sampling.max_tokens for choice in self._choices)
            self._meter.reserve_tokens(self._n_prompt_tokens + n_output)
            self._n_reserved = self._n_prompt_tokens + n_output

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _release_when_finished(self) -> None:
        if self._unfinished or self._submitting or self._released:
            return
        self._released = True
        self._chosen.release()
        if self._meter is not None:
            self._meter.give_back_tokens(self._n_reserved)

    def _digest(self, event: TokenEvent) -> ChoiceDelta | None:
        choice = self._by_id[event.request_id]
        if choice.ended:
            return None
        if event.finish is FinishReason.ERROR or event.finish is FinishReason.CANCELLED:
            choice.ended = True
            self._failure = failure_of(event, self._prompt_param)
            self._metrics.finished("error", choice.n_output)
            return None
        if choice.n_output == 0:
            self._count_cached(choice, event.n_cached)
        delta = choice.take(event)
        if delta is not None and delta.finish_reason is not None:
            self._metrics.finished(delta.finish_reason, choice.n_output)
            if event.request_id in self._unfinished:  # a stop string: the engine goes on
                self._engine.cancel(event.request_id)
        return delta

    def _count_cached(self, choice: Choice, n_cached: int) -> None:
        """Of several choices of one prompt the first counts: the others reuse what it computed."""
        prompt = choice.spec.request.prompt_ids
        self._cached[prompt] = min(n_cached, self._cached.get(prompt, n_cached))
        self._metrics.found_in_prefix_cache(n_cached)


def failure_of(event: TokenEvent, prompt_param: str) -> ApiError:
    """Of a last event that is an error or a cancellation."""
    if event.finish is FinishReason.CANCELLED:
        return ApiError(503, "the request was cancelled", code="cancelled")
    if event.error is None:
        return ApiError(500, "the engine failed without saying why", code="engine_error")
    return from_engine(event.error, prompt_param=prompt_param)
