"""Turns the results of steps into events, from a request's arrival to its last event.

accept ──► process (tokens, pooled rows) … ──► end: frees everything and sends the last event
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .errors import ContextOverflow, EngineError, GrammarTooComplex
from .memory.kv_cache import KvCache
from .requests.client import Listener
from .requests.events import FinishReason, TokenEvent, TokenLogprobs
from .requests.inbox import Inbox
from .requests.pooling import PooledRows, Pooling
from .requests.request import Constraint, Request
from .sampling.sampler import Sampled
from .scheduling.scheduler import ScheduledChunk, Scheduler
from .scheduling.step_stats import StepStats
from .steps.step_runner import StepResult

_log = logging.getLogger(__name__)


class OutputProcessor:
    """Owner of the requests from ``accept`` to their last event. Used on the engine thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        kv_cache: KvCache,
        inbox: Inbox,
        stats: StepStats,
        *,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        jump_forward: bool,
    ) -> None:
        """``jump_forward``: compute tokens that a grammar forces together, in one step."""
        self._scheduler = scheduler
        self._kv_cache = kv_cache
        self._inbox = inbox
        self._stats = stats
        self._max_model_len = max_model_len
        self._eos_token_ids = eos_token_ids
        self._jump_forward = jump_forward
        self._output_router = OutputRouter()
        self._requests: dict[str, Request] = {}

    def accept(self, request: Request) -> None:
        """Queues the request, or fails it if the whole KV cache is too small for it."""
        self._requests[request.id] = request
        self._scheduler.add(request)
        n_most = min(request.n_prompt + request.source.sampling.max_tokens, self._max_model_len)
        if self._kv_cache.pages_needed(n_most) > self._kv_cache.n_pages:
            capacity = self._kv_cache.n_pages * self._kv_cache.page_size
            error = ContextOverflow(
                f"prompt and output need {n_most} tokens of KV memory, the server has {capacity}; "
                "ask for less or raise --kv-memory"
            )
            self.fail(request, error)
            return
        grammar = request.source.grammar
        if grammar is not None:
            request.constraint = Constraint(grammar)
            # One token is left to sample: a request ends with a step.
            self._append_forced(request, request.constraint, self.n_left(request) - 1)

    def has(self, request: Request) -> bool:
        """Return True until the request has ended."""
        return self._requests.get(request.id) is request

    def process(self, chunks: Sequence[ScheduledChunk], result: StepResult) -> None:
        """Commits a step's chunks and sends what it computed. All chunks were started."""
        self._scheduler.commit(chunks)
        for chunk in chunks:
            request = chunk.request
            first = max(0, chunk.start - request.n_virtual)  # preempted: the chunk comes again
            request.prompt_logprobs[first:] = result.prompt_logprobs.get(request.id, ())
            sampled = result.sampled.get(request.id)
            if sampled is not None:
                self._append_verified(chunk, sampled)
            elif request.source.pooling is not None:
                self._pool(chunk, request.source.pooling, result.pooled.get(request.id))

    def cancel(self, request_id: str) -> None:
        """Ends the request; does nothing if it has ended."""
        if request_id in self._requests:
            self._end(self._requests[request_id], _Finish(FinishReason.CANCELLED))

    def fail(self, request: Request, error: EngineError) -> None:
        """Ends the request with ``error``."""
        self._end(request, _Finish(FinishReason.ERROR, error=error))

    def fail_all(self, error: EngineError) -> None:
        """Ends every request with ``error`` and sends the events."""
        for request in list(self._requests.values()):
            self.fail(request, error)
        self.flush()

    def flush(self) -> None:
        """Sends the events of a step, with one wake-up for each event loop."""
        self._output_router.flush()

    def close(self, unread: Sequence[Request], error: EngineError) -> None:
        """Sends ``error`` to all open requests and to ``unread``, since the thread ends.

        Touches neither the scheduler nor the device: either may be broken.
        """
        for request in (*self._requests.values(), *unread):
            self._emit(request, _Finish(FinishReason.ERROR, error=error))
        self._requests.clear()
        self.flush()

    def n_left(self, request: Request) -> int:
        """Return how many more tokens the answer may get."""
        n_output = request.source.sampling.max_tokens - request.n_output
        return min(n_output, self._max_model_len - request.n_tokens)

    def _pool(self, chunk: ScheduledChunk, pooling: Pooling, hidden: Tensor | None) -> None:
        request = chunk.request
        if request.pooled is None or chunk.start <= request.n_virtual:
            request.pooled = PooledRows(pooling)  # at the beginning, also after a preemption
        if hidden is not None:
            request.pooled.add(hidden)
        if chunk.samples:
            self._end(request, _Finish(FinishReason.STOP, pooled=request.pooled.result()))

    def _append_verified(self, chunk: ScheduledChunk, sampled: Sequence[Sampled]) -> None:
        """Appends the first sampled token, and further ones as long as the drafts are right.

        Tokens that a grammar forces may come before their row; then the row only verifies them.
        """
        request, first, n_right = chunk.request, chunk.start + chunk.n_tokens, 0
        request.n_drafted += len(chunk.drafts)
        for row, token in enumerate(sampled):
            if row == request.n_tokens - first:
                self._append(request, token, chunk.generating[row].constraint)
            if row == len(chunk.drafts) or not self.has(request):
                break
            if chunk.drafts[row] != request.token_ids[first + row]:
                break
            n_right += 1
            request.n_accepted += 1
            request.n_computed += 1
        if chunk.drafts:
            self._stats.count_drafts(len(chunk.drafts), n_right)
            if request.guesses is not None:
                request.guesses.learn(len(chunk.drafts), n_right)

    def _append(self, request: Request, sampled: Sampled, masking: Constraint | None) -> None:
        """``masking``: the state of the grammar that the token's mask was computed from."""
        params, token = request.source.sampling, sampled.token_id
        constraint = request.constraint
        if masking is not None and masking.error is not None:  # there was no mask
            self.fail(request, _too_complex(masking.error))
            return
        if sampled.error is not None:
            self.fail(request, sampled.error)
            return
        logprobs = () if sampled.logprobs is None else (sampled.logprobs,)
        is_end = token in self._eos_token_ids and (constraint is not None or not params.ignore_eos)
        if is_end or token in params.stop_token_ids:
            self._end(request, _Finish(FinishReason.STOP, stop_token=token), logprobs)
            return
        request.token_ids.append(token)
        if constraint is not None:
            self._stats.count_jump_forward(constraint.forced is not None)
            constraint.accept(token)
            self._append_forced(request, constraint, self.n_left(request))
        if constraint is not None and constraint.error is not None:
            self.fail(request, _too_complex(constraint.error))
        elif constraint is not None and constraint.ended:
            self._end(request, _Finish(FinishReason.STOP), logprobs)
        elif self.n_left(request) <= 0:
            self._end(request, _Finish(FinishReason.LENGTH), logprobs)
        else:
            self._emit(request, logprobs=logprobs)

    def _append_forced(self, request: Request, constraint: Constraint, n_most: int) -> None:
        """Appends the tokens that the grammar forces; the next step computes them together.

        With log-probabilities they come one by one, since each needs the logits before it. So do
        they with bad words, which may forbid them.
        """
        params = request.source.sampling
        if params.logprobs is not None or params.bad_words or not self._jump_forward:
            return
        forced = constraint.take_forced(n_most, params.stop_token_ids | self._eos_token_ids)
        request.token_ids += forced
        self._stats.count_jump_forward(len(forced))

    def _end(
        self, request: Request, finish: _Finish, logprobs: tuple[TokenLogprobs, ...] = ()
    ) -> None:
        """Frees everything the request holds and sends its last event. The only way to end."""
        self._scheduler.finish(request)
        del self._requests[request.id]
        self._inbox.ended(request)
        self._emit(request, finish, logprobs)

    def _emit(
        self,
        request: Request,
        finish: _Finish | None = None,
        logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> None:
        """Sends the tokens that the listener does not have; none if the request failed."""
        is_first = request.n_sent == 0
        finish = finish or _Finish(None)
        failed = finish.reason in (FinishReason.ERROR, FinishReason.CANCELLED)
        token_ids = () if failed else tuple(request.token_ids[request.n_prompt + request.n_sent :])
        request.n_sent += len(token_ids)
        event = TokenEvent(
            request.id,
            token_ids,
            logprobs,
            finish=finish.reason,
            stop_token=finish.stop_token,
            error=finish.error,
            n_cached=max(0, request.n_cached - request.n_virtual),
            queue_s=request.queue_s if is_first else 0.0,
            prompt_logprobs=_prompt_logprobs(request) if is_first else (),
            n_drafted=request.n_drafted,
            n_accepted=request.n_accepted,
            pooled=finish.pooled,
        )
        self._output_router.put(request, event)


@dataclass(frozen=True, slots=True)
class _Finish:
    """The end of a request, see ``TokenEvent``."""

    reason: FinishReason | None
    stop_token: int | None = None
    error: EngineError | None = None
    pooled: Tensor | None = None


def _too_complex(reason: str) -> GrammarTooComplex:
    return GrammarTooComplex(
        f"the answer's grammar cannot be followed any further: it is too complex, or allows "
        f"nothing here ({reason[:200]}); simplify the schema or the grammar"
    )


def _prompt_logprobs(request: Request) -> tuple[TokenLogprobs | None, ...]:
    """The log-probabilities of the prompt's tokens; empty if the request does not ask for them."""
    if request.source.sampling.prompt_logprobs is None:
        return ()
    return (None, *request.prompt_logprobs)


class OutputRouter:
    """A buffer of events with one wake-up per event loop and step. Engine thread only."""

    def __init__(self) -> None:
        self._pending: list[tuple[asyncio.AbstractEventLoop, Listener, TokenEvent]] = []

    def put(self, request: Request, event: TokenEvent) -> None:
        if request.loop is not None:
            self._pending.append((request.loop, request.listener, event))

    def flush(self) -> None:
        """Delivers the buffered events. A closed loop loses only its own events."""
        pending, self._pending = self._pending, []
        for loop in {loop for loop, _, _ in pending}:
            mine = [(listener, event) for other, listener, event in pending if other is loop]
            try:
                loop.call_soon_threadsafe(_deliver, mine)
            except RuntimeError:  # the loop is closed: its clients are gone
                continue


def _deliver(events: Sequence[tuple[Listener, TokenEvent]]) -> None:
    for listener, event in events:
        try:
            listener(event)
        except Exception:  # only its own request may suffer
            _log.exception("the listener of request %s failed", event.request_id)
