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
from dataclasses import dataclass, field
from time import perf_counter
from typing import NamedTuple

from tokenizers import Tokenizer

from loraplex_server.engine.client import EngineClient, GenerationRequest
from loraplex_server.engine.errors import EngineError
from loraplex_server.engine.events import FinishReason, TokenEvent, TokenLogprobs

from .adapter_choice import Chosen
from .detokenizer import StreamDetokenizer
from .errors import ApiError, from_engine
from .metrics.server_metrics import CallMetrics
from .sampling import StopRule
from .stop_strings import StopScanner

__all__ = [
    "ChoiceDelta",
    "ChoiceRequest",
    "CollectedChoice",
    "Generation",
    "LiveGenerations",
    "TokenEntry",
    "Usage",
]


@dataclass(frozen=True, slots=True)
class ChoiceRequest:
    """One choice to generate, in the order of the answer's indices."""

    request: GenerationRequest
    stop: StopRule
    skip_special_tokens: bool = True
    discard_output: bool = False  # scoring: the prompt's log-probabilities are all that is wanted


class TokenEntry(NamedTuple):
    """A generated token with its log-probabilities and where its text begins."""

    logprobs: TokenLogprobs
    offset: int  # characters of output before it


@dataclass(frozen=True, slots=True)
class ChoiceDelta:
    """What one event of the engine adds to one choice."""

    index: int  # of the choice
    text: str
    token_ids: tuple[int, ...]
    entries: list[TokenEntry]  # empty unless logprobs were asked for
    finish_reason: str | None  # "stop" or "length" on the last delta of a choice
    stop_reason: str | int | None  # which stop string or stop token id it was
    prompt_logprobs: tuple[TokenLogprobs | None, ...]  # on the first delta, when asked for


@dataclass(slots=True)
class CollectedChoice:
    """A choice's deltas put together, for answers that are not streamed."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    entries: list[TokenEntry] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()

    def add(self, delta: ChoiceDelta) -> None:
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.entries += delta.entries
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason
        self.prompt_logprobs = self.prompt_logprobs or delta.prompt_logprobs


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


class LiveGenerations:
    """All generations of the server, so that a shutdown can end each with a final event."""

    def __init__(self) -> None:
        self._live: set[Generation] = set()

    def __len__(self) -> int:
        return len(self._live)

    def add(self, generation: Generation) -> None:
        self._live.add(generation)

    def discard(self, generation: Generation) -> None:
        self._live.discard(generation)

    def fail_all(self, error: ApiError) -> None:
        for generation in list(self._live):
            generation.fail(error)


@dataclass(slots=True)
class _Choice:
    index: int
    spec: ChoiceRequest
    detokenizer: StreamDetokenizer
    scanner: StopScanner
    n_output: int = 0
    n_chars: int = 0  # text found so far, held-back part included
    n_shown: int = 0  # text already in deltas
    ended: bool = False  # nothing more will be shown
    finished: bool = False  # the engine sent its last event
    entries: list[TokenEntry] = field(default_factory=list)  # not yet in a delta
    token_ids: list[int] = field(default_factory=list)  # not yet in a delta
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()  # not yet in a delta
    last_token_at: float = 0.0


class Generation:
    """Lives on one event loop. Submits in ``start``; iterate ``deltas`` once; then ``close``."""

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        choices: Sequence[ChoiceRequest],
        *,
        chosen: Chosen,
        live: LiveGenerations,
        metrics: CallMetrics,
        prompt_param: str,
        n_prompt_tokens: int,
    ) -> None:
        """Takes over ``chosen`` and releases it. ``n_prompt_tokens``: each prompt counted once."""
        self._engine = engine
        self._chosen = chosen
        self._live = live
        self._metrics = metrics
        self._prompt_param = prompt_param
        self._n_prompt_tokens = n_prompt_tokens
        self._choices = [_choice(i, spec, tokenizer) for i, spec in enumerate(choices)]
        self._by_id = {choice.spec.request.request_id: choice for choice in self._choices}
        self._unfinished: set[str] = set()  # submitted, last event not seen
        self._events: deque[TokenEvent] = deque()
        self._cached: dict[tuple[int, ...], int] = {}  # prompt → tokens from the prefix cache
        self._failure: ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._submitting = False
        self._closed = False
        self._released = False

    def start(self) -> None:
        """Submits every choice, or none: raises ApiError and then holds nothing any more."""
        self._live.add(self)
        self._submitting = True
        try:
            for request_id, choice in self._by_id.items():
                self._unfinished.add(request_id)
                try:
                    self._engine.submit(choice.spec.request, self._on_event)
                except EngineError:
                    self._unfinished.discard(request_id)
                    raise
        except EngineError as error:
            self._submitting = False
            self.close()
            raise from_engine(error, prompt_param=self._prompt_param) from error
        self._submitting = False

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
        for choice in self._choices:
            if not choice.ended and choice.spec.request.request_id in self._unfinished:
                self._metrics.finished("abort", choice.n_output)
        for request_id in list(self._unfinished):
            self._engine.cancel(request_id)
        self._release_when_finished()

    # The engine's side: called on the event loop, must be quick.

    def _on_event(self, event: TokenEvent) -> None:
        choice = self._by_id[event.request_id]
        now = perf_counter()
        if event.token_ids and not choice.ended:
            n_tokens = len(event.token_ids)
            self._metrics.tokens(n_tokens, now, previous=choice.last_token_at or None)
            choice.last_token_at = now
        if event.queue_s:
            self._metrics.queued(event.queue_s)
        if event.finish is not None:
            choice.finished = True
            self._unfinished.discard(event.request_id)
            self._release_when_finished()
        if not self._closed:
            self._events.append(event)
            self._wake()

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

    # One event to one delta.

    def _digest(self, event: TokenEvent) -> ChoiceDelta | None:
        choice = self._by_id[event.request_id]
        if choice.ended:
            return None
        if event.finish is FinishReason.ERROR:
            self._failure = _failure(event.error, self._prompt_param)
            self._metrics.finished("error", choice.n_output)
            choice.ended = True
            return None
        if event.finish is FinishReason.CANCELLED:
            self._failure = ApiError(503, "the request was cancelled", code="cancelled")
            choice.ended = True
            return None
        if event.n_cached:
            self._cached[choice.spec.request.prompt_ids] = event.n_cached
        choice.prompt_logprobs = choice.prompt_logprobs or event.prompt_logprobs
        if not event.token_ids and event.finish is None:
            return None  # a client's first delta is its first token
        shown, stop = self._text_of(choice, event)
        if stop is not None:
            return self._stopped(choice, event.request_id, shown, stop)
        if event.finish is not None:
            shown += self._tail_of(choice)
            return self._finished(choice, event, shown)
        return self._delta(choice, shown, None, None)

    def _text_of(self, choice: _Choice, event: TokenEvent) -> tuple[str, str | None]:
        """Feeds the tokens one by one; stops at the token that completes a stop string."""
        shown = ""
        min_tokens = choice.spec.stop.min_tokens
        for position, token_id in enumerate(event.token_ids):
            choice.n_output += 1
            choice.token_ids.append(token_id)
            if event.logprobs:
                entry = TokenEntry(event.logprobs[position], choice.n_chars)
                choice.entries.append(entry)
            text = choice.detokenizer.push(token_id)
            choice.n_chars += len(text)
            scanned = choice.scanner.push(text, armed=choice.n_output > min_tokens)
            shown += scanned.text
            if scanned.stop is not None:
                return shown, scanned.stop
        return shown, None

    def _tail_of(self, choice: _Choice) -> str:
        """What was held back; a last character may still complete a stop string, then it ends."""
        scanned = choice.scanner.push(choice.detokenizer.flush())
        return scanned.text + ("" if scanned.stop else choice.scanner.flush())

    def _stopped(self, choice: _Choice, request_id: str, shown: str, stop: str) -> ChoiceDelta:
        choice.ended = True
        if not choice.finished:
            self._engine.cancel(request_id)
        cut = choice.n_shown + len(shown)
        choice.entries = [entry for entry in choice.entries if entry.offset < cut]
        return self._delta(choice, shown, "stop", stop)

    def _finished(self, choice: _Choice, event: TokenEvent, shown: str) -> ChoiceDelta:
        choice.ended = True
        stop_reason = None
        if event.stop_token is not None:
            choice.n_output += 1  # the end token was generated too, it is only not shown
            if event.stop_token in choice.spec.request.sampling.stop_token_ids:
                stop_reason = event.stop_token
        reason = "length" if event.finish is FinishReason.LENGTH else "stop"
        return self._delta(choice, shown, reason, stop_reason)

    def _delta(
        self,
        choice: _Choice,
        shown: str,
        finish_reason: str | None,
        stop_reason: str | int | None,
    ) -> ChoiceDelta:
        choice.n_shown += len(shown)
        if finish_reason is not None:
            self._metrics.finished(finish_reason, choice.n_output)
        prompt_logprobs, choice.prompt_logprobs = choice.prompt_logprobs, ()
        token_ids = tuple(choice.token_ids)
        choice.token_ids.clear()
        if choice.spec.discard_output:
            reason = None if finish_reason is None else "length"
            return ChoiceDelta(choice.index, "", (), [], reason, None, prompt_logprobs)
        entries = choice.entries
        if finish_reason is None and choice.n_shown < choice.n_chars:
            # Text is held back for a stop string: so are the tokens that begin in it.
            entries = [entry for entry in choice.entries if entry.offset < choice.n_shown]
        choice.entries = choice.entries[len(entries) :]
        return ChoiceDelta(
            choice.index, shown, token_ids, entries, finish_reason, stop_reason, prompt_logprobs
        )


def _choice(index: int, spec: ChoiceRequest, tokenizer: Tokenizer) -> _Choice:
    detokenizer = StreamDetokenizer(
        tokenizer,
        skip_special_tokens=spec.skip_special_tokens,
        context=spec.request.prompt_ids,
    )
    scanner = StopScanner(spec.stop.strings, include_in_output=spec.stop.include_in_output)
    return _Choice(index, spec, detokenizer, scanner)


def _failure(error: EngineError | None, prompt_param: str) -> ApiError:
    if error is None:
        return ApiError(500, "the engine failed without saying why", code="engine_error")
    return from_engine(error, prompt_param=prompt_param)
