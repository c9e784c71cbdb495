"""One API call's generated choices: submitted together, merged to ordered deltas, always ended.

submit ──► listener (event loop) ──► deltas() ──► route
             counts, timestamps       text, stop strings, order of first chunks
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from time import perf_counter
from typing import NamedTuple

from tokenizers import Tokenizer

from loraplex_server.adapters.resolver import ResolvedAdapter
from loraplex_server.api.errors import ApiError, from_engine
from loraplex_server.api.middleware.rate_limit import Meter
from loraplex_server.engine.client import EngineClient
from loraplex_server.engine.errors import EngineError
from loraplex_server.engine.events import FinishReason, TokenEvent
from loraplex_server.metrics.server_metrics import CallMetrics

from .choice import Choice, ChoiceDelta, ChoiceRequest, CollectedChoice
from .engine_call import EngineCall, LiveCalls, failure_of

__all__ = ["Generation", "Usage"]


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


class Generation:
    """Lives on one event loop. Submits in ``start``; iterate ``deltas`` once; then ``close``."""

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        choices: Sequence[ChoiceRequest],
        *,
        chosen: ResolvedAdapter,
        live: LiveCalls,
        metrics: CallMetrics,
        meter: Meter | None,
        prompt_param: str,
        n_prompt_tokens: int,
    ) -> None:
        """Takes over ``chosen`` and releases it. ``n_prompt_tokens``: each prompt counted once."""
        self._metrics = metrics
        self._prompt_param = prompt_param
        self._n_prompt_tokens = n_prompt_tokens
        self._choices = [Choice(i, spec, tokenizer) for i, spec in enumerate(choices)]
        self._by_id = {choice.request_id: choice for choice in self._choices}
        self._last_token_at: dict[str, float] = {}
        self._cached: dict[tuple[int, ...], int] = {}  # prompt → tokens from the prefix cache
        self._failure: ApiError | None = None  # of a choice
        self._is_admitted = False
        self._closed = False
        self._call = EngineCall(engine, chosen=chosen, live=live, meter=meter, count=self._count)

    async def start(self) -> None:
        """Submits every choice, or none: raises ApiError and then holds nothing any more."""
        n_output = sum(choice.spec.request.sampling.max_tokens for choice in self._choices)
        try:
            await self._call.reserve(self._n_prompt_tokens + n_output)
            for choice in self._choices:
                self._call.submit(choice.spec.request)
            self._is_admitted = True
            self._metrics.admitted()
            self._call.spend(self._n_prompt_tokens)
            self._call.all_submitted()
        except EngineError as error:
            raise from_engine(error, prompt_param=self._prompt_param) from error
        finally:
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
            while self._call.events:
                delta = self._digest(self._call.events.popleft())
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
            failure = self._failure or self._call.failure
            if failure is not None and n_open:
                raise failure
            if n_open:
                await self._call.arrival()

    async def collect(self) -> list[CollectedChoice]:
        """The whole answer. Raises ApiError."""
        collected = [CollectedChoice(choice.index) for choice in self._choices]
        async for deltas in self.deltas():
            for delta in deltas:
                collected[delta.index].add(delta)
        return collected

    def close(self) -> None:
        """Cancels what still runs. Idempotent, never blocks; belongs in a ``finally``."""
        if self._closed:
            return
        self._closed = True
        for choice in self._choices if self._is_admitted else ():
            if not choice.ended and choice.request_id in self._call.running:
                self._metrics.finished("abort", choice.n_output)
        self._call.close()

    def _count(self, event: TokenEvent) -> None:
        """Tokens and times, as the event comes."""
        choice = self._by_id[event.request_id]
        now = perf_counter()
        if event.queue_s and self._is_admitted:
            self._metrics.queued(event.queue_s)
        if event.token_ids and not choice.ended and self._is_admitted:
            previous = self._last_token_at.get(event.request_id)
            self._metrics.tokens(len(event.token_ids), now, previous=previous)
            self._call.spend(len(event.token_ids))
            self._last_token_at[event.request_id] = now

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
            self._call.cancel(event.request_id)  # after a stop string the engine goes on
        return delta

    def _count_cached(self, choice: Choice, n_cached: int) -> None:
        """Of several choices of one prompt the first counts: the others reuse what it computed."""
        prompt = choice.spec.request.prompt_ids
        self._cached[prompt] = min(n_cached, self._cached.get(prompt, n_cached))
        self._metrics.found_in_prefix_cache(n_cached)
