"""Requests while they are in the engine: what each gets of a step, and how it ends.

accept ──► take (tokens, pooled rows) … ──► end: all is freed, the last event goes out
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .constraint import Constraint
from .errors import ContextOverflow, EngineError, GrammarTooComplex
from .events import FinishReason, TokenEvent, TokenLogprobs
from .inbox import Inbox
from .kv_cache import KvCache
from .model_runner import StepResult
from .output_router import OutputRouter
from .pooling import PooledRows, Pooling
from .request import Request
from .sampler import Sampled
from .scheduler import ScheduledChunk, Scheduler
from .step_stats import StepStats

__all__ = ["Answers"]


class Answers:
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
        feeds_forced: bool,
    ) -> None:
        """``feeds_forced``: tokens that a grammar leaves no choice about are computed together."""
        self._scheduler = scheduler
        self._kv_cache = kv_cache
        self._inbox = inbox
        self._stats = stats
        self._max_model_len = max_model_len
        self._eos_token_ids = eos_token_ids
        self._feeds_forced = feeds_forced
        self._output_router = OutputRouter()
        self._requests: dict[str, Request] = {}

    def accept(self, request: Request) -> None:
        self._requests[request.id] = request
        self._scheduler.add(request)
        n_most = min(request.n_prompt + request.source.sampling.max_tokens, self._max_model_len)
        if self._kv_cache.pages_for(n_most) > self._kv_cache.n_pages:
            n_held = self._kv_cache.n_pages * self._kv_cache.page_size
            error = ContextOverflow(
                f"prompt and output need {n_most} tokens of KV memory, the server has {n_held}; "
                "ask for less or raise --kv-memory"
            )
            self.fail(request, error)
            return
        grammar = request.source.grammar
        if grammar is not None:
            request.constraint = Constraint(grammar)
            # One token is left to sample: a request ends with a step.
            self._feed_forced(request, request.constraint, self.room(request) - 1)

    def has(self, request: Request) -> bool:
        """Whether it has not ended."""
        return self._requests.get(request.id) is request

    def take(self, chunks: Sequence[ScheduledChunk], result: StepResult) -> None:
        """What a step computed for each of its chunks, all of which were started."""
        self._scheduler.commit(chunks)
        for chunk in chunks:
            request = chunk.request
            first = max(0, chunk.start - request.n_virtual)  # preempted: the chunk comes again
            request.prompt_logprobs[first:] = result.prompt_logprobs.get(request.id, ())
            sampled = result.sampled.get(request.id)
            if sampled is not None:
                self._append(request, sampled)
            elif request.source.pooling is not None:
                self._pool(chunk, request.source.pooling, result.pooled.get(request.id))

    def cancel(self, request_id: str) -> None:
        """Nothing happens where it has ended."""
        if request_id in self._requests:
            self._end(self._requests[request_id], FinishReason.CANCELLED)

    def fail(self, request: Request, error: EngineError) -> None:
        self._end(request, FinishReason.ERROR, error=error)

    def fail_all(self, error: EngineError) -> None:
        for request in list(self._requests.values()):
            self.fail(request, error)
        self.flush()

    def flush(self) -> None:
        """Sends the events of a step: one wake-up for each event loop."""
        self._output_router.flush()

    def close(self, unread: Sequence[Request], error: EngineError) -> None:
        """The thread ends: those that are here and ``unread`` get an error.

        Touches neither the scheduler nor the device, which may be what broke.
        """
        for request in (*self._requests.values(), *unread):
            self._emit(request, finish=FinishReason.ERROR, error=error)
        self._requests.clear()
        self.flush()

    def room(self, request: Request) -> int:
        """Tokens that the answer may still get."""
        n_output = request.source.sampling.max_tokens - request.n_output
        return min(n_output, self._max_model_len - request.n_tokens)

    def _pool(self, chunk: ScheduledChunk, pooling: Pooling, hidden: Tensor | None) -> None:
        request = chunk.request
        if request.pooled is None or chunk.start <= request.n_virtual:
            request.pooled = PooledRows(pooling)  # at the beginning, also after a preemption
        if hidden is not None:
            request.pooled.add(hidden)
        if chunk.samples:
            self._end(request, FinishReason.STOP, pooled=request.pooled.result())

    def _append(self, request: Request, sampled: Sampled) -> None:
        params, token = request.source.sampling, sampled.token_id
        constraint = request.constraint
        if constraint is not None and constraint.error is not None:  # its mask was none
            self.fail(request, _too_complex(constraint.error))
            return
        if sampled.error is not None:
            self.fail(request, sampled.error)
            return
        logprobs = () if sampled.logprobs is None else (sampled.logprobs,)
        is_end = token in self._eos_token_ids and (constraint is not None or not params.ignore_eos)
        if is_end or token in params.stop_token_ids:
            self._end(request, FinishReason.STOP, logprobs=logprobs, stop_token=token)
            return
        request.token_ids.append(token)
        if constraint is not None:
            self._stats.forced(constraint.forced is not None)
            constraint.accept(token)
            self._feed_forced(request, constraint, self.room(request))
        if constraint is not None and constraint.error is not None:
            self.fail(request, _too_complex(constraint.error))
        elif constraint is not None and constraint.ended:
            self._end(request, FinishReason.STOP, logprobs=logprobs)
        elif self.room(request) <= 0:
            self._end(request, FinishReason.LENGTH, logprobs=logprobs)
        else:
            self._emit(request, logprobs=logprobs)

    def _feed_forced(self, request: Request, constraint: Constraint, room: int) -> None:
        """Tokens that the grammar leaves no choice about: the next step computes them together.

        With log-probabilities they come one by one, since each needs the logits before it, and
        with bad words, which may forbid them.
        """
        params = request.source.sampling
        if params.logprobs is not None or params.bad_words or not self._feeds_forced:
            return
        forced = constraint.take_forced(room, params.stop_token_ids | self._eos_token_ids)
        request.token_ids += forced
        self._stats.forced(len(forced))

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        *,
        logprobs: tuple[TokenLogprobs, ...] = (),
        stop_token: int | None = None,
        error: EngineError | None = None,
        pooled: Tensor | None = None,
    ) -> None:
        """The one way out: frees everything, sends the last event."""
        self._scheduler.finish(request)
        del self._requests[request.id]
        self._inbox.ended(request)
        self._emit(
            request,
            logprobs=logprobs,
            finish=reason,
            stop_token=stop_token,
            error=error,
            pooled=pooled,
        )

    def _emit(
        self,
        request: Request,
        *,
        logprobs: tuple[TokenLogprobs, ...] = (),
        finish: FinishReason | None = None,
        stop_token: int | None = None,
        error: EngineError | None = None,
        pooled: Tensor | None = None,
    ) -> None:
        """Sends the tokens that the listener does not have; a failed request shows no more."""
        is_first = request.n_sent == 0
        failed = finish is FinishReason.ERROR or finish is FinishReason.CANCELLED
        token_ids = () if failed else tuple(request.token_ids[request.n_prompt + request.n_sent :])
        request.n_sent += len(token_ids)
        event = TokenEvent(
            request.id,
            token_ids,
            logprobs,
            finish=finish,
            stop_token=stop_token,
            error=error,
            n_cached=max(0, request.n_cached - request.n_virtual),
            queue_s=request.queue_s if is_first else 0.0,
            prompt_logprobs=_prompt_logprobs(request) if is_first else (),
            pooled=pooled,
        )
        self._output_router.put(request, event)


def _too_complex(reason: str) -> GrammarTooComplex:
    return GrammarTooComplex(
        f"the answer's grammar cannot be followed any further: it is too complex, or allows "
        f"nothing here ({reason[:200]}); simplify the schema or the grammar"
    )


def _prompt_logprobs(request: Request) -> tuple[TokenLogprobs | None, ...]:
    """Of the prompt's own tokens; empty unless asked for."""
    if request.source.sampling.prompt_logprobs is None:
        return ()
    return (None, *request.prompt_logprobs)
