"""The choices of one API call: submitted together, merged in order, always ended.

submit ──► listener (event loop) ──► outputs() ──► route
             counts, timestamps       text, stop strings, order of first chunks
"""

from collections.abc import AsyncIterator, Sequence
from time import perf_counter
from typing import NamedTuple

from tokenizers import Tokenizer

from loraplex_server.engine.errors import EngineError
from loraplex_server.engine.requests.events import FinishReason, TokenEvent
from loraplex_server.errors import ApiError, from_engine

from .choice import Choice, ChoiceOutput, ChoiceRequest
from .engine_call import CallContext, EngineCall, failure_of


class Usage(NamedTuple):
    n_prompt: int
    n_output: int
    n_cached: int
    n_drafted: int = 0  # guesses of next tokens
    n_accepted: int = 0  # guesses that became tokens of the answers

    def to_json(self) -> dict[str, object]:
        shown: dict[str, object] = {
            "prompt_tokens": self.n_prompt,
            "completion_tokens": self.n_output,
            "total_tokens": self.n_prompt + self.n_output,
            "prompt_tokens_details": {"cached_tokens": self.n_cached},
        }
        if self.n_drafted:
            shown["completion_tokens_details"] = {
                "accepted_prediction_tokens": self.n_accepted,
                "rejected_prediction_tokens": self.n_drafted - self.n_accepted,
            }
        return shown


class Generation:
    """The choices of one call, on one event loop.

    Call ``start``, iterate ``outputs`` once, then ``close``.
    """

    def __init__(
        self,
        context: CallContext,
        tokenizer: Tokenizer,
        choices: Sequence[ChoiceRequest],
        *,
        n_prompt_tokens: int,
    ) -> None:
        """Takes over the adapter's lease. ``n_prompt_tokens`` counts each prompt once."""
        self._metrics = context.metrics
        self._prompt_param = context.prompt_param
        self._n_prompt_tokens = n_prompt_tokens
        self._choices = [Choice(i, spec, tokenizer) for i, spec in enumerate(choices)]
        self._by_id = {choice.request_id: choice for choice in self._choices}
        self._last_token_at: dict[str, float] = {}
        self._cached: dict[tuple[int, ...], int] = {}  # prompt → tokens from the prefix cache
        self._n_drafted: dict[str, int] = {}  # by request id, like the next field
        self._n_accepted: dict[str, int] = {}
        self._failure: ApiError | None = None  # of a choice
        self._is_admitted = False
        self._closed = False
        self._call = EngineCall(context, self._count)

    async def start(self) -> None:
        """Submit every choice. Raises ApiError; then no choice runs and the adapter is released."""
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
        return Usage(
            self._n_prompt_tokens,
            n_output,
            sum(self._cached.values()),
            sum(self._n_drafted.values()),
            sum(self._n_accepted.values()),
        )

    async def outputs(self) -> AsyncIterator[list[ChoiceOutput]]:
        """Yield the outputs since the last time. Choices begin in the order of their indices.

        Raises ApiError if a choice failed, after the outputs that came before the failure.
        """
        n_open = len(self._choices)
        waiting: dict[int, list[ChoiceOutput]] = {}  # outputs of choices that may not begin yet
        turn = 0  # choices below this index have begun
        while n_open:
            ready: list[ChoiceOutput] = []
            while self._call.events:
                output = self._digest(self._call.events.popleft())
                if output is None:
                    continue
                n_open -= output.finish_reason is not None
                if output.index > turn:
                    waiting.setdefault(output.index, []).append(output)
                    continue
                ready.append(output)
                if output.index == turn:
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

    async def collect(self) -> list[ChoiceOutput]:
        """Return every choice whole. Raises ApiError."""
        collected = [ChoiceOutput(choice.index) for choice in self._choices]
        async for outputs in self.outputs():
            for output in outputs:
                collected[output.index].add(output)
        return collected

    def close(self) -> None:
        """Cancel running choices. Idempotent, never blocks. Belongs in a ``finally``."""
        if self._closed:
            return
        self._closed = True
        for choice in self._choices if self._is_admitted else ():
            if not choice.ended and choice.request_id in self._call.running:
                self._metrics.finished("abort", choice.n_output)
        self._call.close()

    def _count(self, event: TokenEvent) -> None:
        """Record tokens and times of an event on arrival."""
        choice = self._by_id[event.request_id]
        now = perf_counter()
        if event.queue_s and self._is_admitted:
            self._metrics.queued(event.queue_s)
        if event.token_ids and not choice.ended and self._is_admitted:
            previous = self._last_token_at.get(event.request_id)
            self._metrics.tokens(len(event.token_ids), now, previous=previous)
            self._call.spend(len(event.token_ids))
            self._last_token_at[event.request_id] = now

    def _digest(self, event: TokenEvent) -> ChoiceOutput | None:
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
        self._n_drafted[event.request_id] = event.n_drafted
        self._n_accepted[event.request_id] = event.n_accepted
        output = choice.take(event)
        if output is not None and output.finish_reason is not None:
            self._metrics.finished(output.finish_reason, choice.n_output)
            self._call.cancel(event.request_id)  # the engine knows no stop strings
        return output

    def _count_cached(self, choice: Choice, n_cached: int) -> None:
        """Keep the smallest count of a prompt: later choices reuse the first choice's prefix."""
        prompt = choice.spec.request.prompt_ids
        self._cached[prompt] = min(n_cached, self._cached.get(prompt, n_cached))
        self._metrics.found_in_prefix_cache(n_cached)
