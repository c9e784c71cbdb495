"""The engine thread: reads messages, runs steps, sends tokens.

    inbox → scheduler → model runner → output router

Where a device of its own computes, a step is scheduled and given to it while the one before still
runs; then the tokens of that one are waited for (``_overlaps``):

    host    schedule 2, start 2 │ wait 1, commit 1 │ schedule 3, start 3 │ wait 2, commit 2 │
    device  1 …                   2 …                                      3 …

Owner of the requests while they are here. All but the constructor and ``stats`` runs on the thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_adapter_store.faults import FaultLog, NoFaultLog

from .constraint import Constraint
from .device_pool import DevicePool
from .errors import (
    ContextOverflow,
    EngineDead,
    EngineDraining,
    EngineError,
    GrammarTooComplex,
    RankLost,
)
from .events import FinishReason, TokenEvent, TokenLogprobs
from .expert_monitor import ExpertMonitor
from .inbox import Inbox
from .kv_cache import KvCache
from .messages import Cancel, FailAll, Lost, Message, SetPinned, Stop, Submit, Unload, Wake, Warm
from .model_runner import ModelRunner, StartedStep, StepResult
from .output_router import OutputRouter
from .pooling import PooledRows, Pooling
from .request import Request
from .sampler import Sampled, is_adjusted
from .scheduler import ScheduledChunk, Scheduler
from .step_stats import StepStats

__all__ = ["EngineLoop"]

_log = logging.getLogger(__name__)

_IDLE_HEARTBEAT_S = 1.0
_N_PREFETCH = 8  # waiting requests whose adapters are loaded ahead
_N_PROBES = 3  # of the model, all of which fail where the device is broken


class EngineLoop:
    """One thread runs ``run`` once."""

    def __init__(
        self,
        runner: ModelRunner,
        kv_cache: KvCache,
        adapters: DevicePool,
        scheduler: Scheduler,
        inbox: Inbox,
        *,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        n_threads: int,
        forced_tokens: bool = True,
        arithmetic: AbstractContextManager[object] = nullcontext(),  # noqa: B008  stateless
        overlaps: bool = False,  # steps and their scheduling
        faults: FaultLog = NoFaultLog(),  # noqa: B008  stateless
    ) -> None:
        self.runner = runner
        self.kv_cache = kv_cache
        self.adapters = adapters
        self.experts = ExpertMonitor()  # safe from any thread
        self.stats = StepStats(scheduler, kv_cache, adapters)
        self.heartbeat = time.monotonic()  # when the thread last showed life
        self.started = threading.Event()
        self.arithmetic = arithmetic  # how this thread multiplies
        self.eos_token_ids = eos_token_ids
        self._scheduler = scheduler
        self._inbox = inbox
        self._faults = faults
        self._output_router = OutputRouter()
        self._requests: dict[str, Request] = {}
        self._max_model_len = max_model_len
        self._n_threads = n_threads
        self._feeds_forced = forced_tokens
        self._overlaps = overlaps
        self._in_flight: _InFlight | None = None
        self._is_stopping = False

    def run(self) -> None:
        """Runs until a ``Stop`` or a device failure, then ends every request with an event."""
        # torch counts threads per thread, but a thread's first call takes the value that any thread
        # set last. Calling ``get`` first fixes that, so no other thread can change it later.
        torch.get_num_threads()
        torch.set_num_threads(self._n_threads)
        try:
            with self.arithmetic:
                try:
                    self.runner.warm_up(self._scheduler.max_step_tokens)
                finally:
                    self.started.set()
                while not self._is_stopping:
                    self._step()
            self._close(EngineDraining("the server went down"))
        except BaseException:
            _log.exception("the engine thread died")
            self._close(EngineDead("the engine stopped; the server's log says why"))

    def _step(self) -> None:
        self._read_inbox()
        if self._in_flight is not None and self._in_flight.is_needed_next:
            self._finish_flight()
        self.adapters.publish_arrived()
        self._scheduler.prefetch(_N_PREFETCH)
        scheduled = self._scheduler.schedule()
        self._inbox.admitted(scheduled.first_admitted)
        for request, error in scheduled.failed:
            self._end(request, FinishReason.ERROR, error=error)
        if self._overlaps:
            self._take_off(scheduled.chunks)
        elif scheduled.chunks:
            self._run_chunks(scheduled.chunks)
        self.stats.after_step(scheduled.chunks)
        if scheduled.chunks:
            self.experts.look(self.adapters.residents, idle=not self._scheduler.running)
        self._output_router.flush()

    def _read_inbox(self) -> None:
        """Takes every message; waits for one while there is nothing to run."""
        is_idle = not self._scheduler.running and self._in_flight is None
        while not self._is_stopping:
            self.heartbeat = time.monotonic()
            message = self._inbox.get(_IDLE_HEARTBEAT_S if is_idle else 0)
            if message is not None:
                self._handle(message)
                is_idle = False
            elif not is_idle or len(self._scheduler.waiting):
                return

    def _handle(self, message: Message) -> None:
        match message:
            case Submit(request):
                self._accept(request)
            case Cancel(request_id):
                if request_id in self._requests:
                    self._end(self._requests[request_id], FinishReason.CANCELLED)
            case SetPinned(digest, pinned):
                self.adapters.set_pinned(digest, pinned)
            case Warm(plan):
                self.adapters.warm(plan)
            case Unload(digest, freed_bytes):
                freed_bytes.send(self.adapters.drop(digest))
            case FailAll(error):
                self._fail_all(error)
            case Lost(why):
                raise RankLost(why)
            case Stop():
                self._is_stopping = True
            case Wake():
                pass

    def _accept(self, request: Request) -> None:
        self._requests[request.id] = request
        self._scheduler.add(request)
        n_most = min(request.n_prompt + request.source.sampling.max_tokens, self._max_model_len)
        if self.kv_cache.pages_for(n_most) > self.kv_cache.n_pages:
            n_held = self.kv_cache.n_pages * self.kv_cache.page_size
            error = ContextOverflow(
                f"prompt and output need {n_most} tokens of KV memory, the server has {n_held}; "
                "ask for less or raise --kv-memory"
            )
            self._end(request, FinishReason.ERROR, error=error)
            return
        grammar = request.source.grammar
        if grammar is not None:
            request.constraint = Constraint(grammar)
            # One token is left to sample: a request ends with a step.
            self._feed_forced(request, request.constraint, self._room(request) - 1)

    def _take_off(self, chunks: Sequence[ScheduledChunk]) -> None:
        """Starts a step behind the one that runs, then waits for that one's tokens."""
        before, started, failed = self._in_flight, None, None
        if chunks:
            try:
                started = self.runner.start(chunks, None if before is None else before.step)
            except Exception as error:
                failed = error
        if not self._finish_flight():
            return  # what was started went on from what failed
        chunks = [chunk for chunk in chunks if self._is_here(chunk.request)]
        if failed is not None:
            self._faults.failed("model", failed)
            self._run_one_by_one(chunks, failed)
        elif started is not None:
            self._scheduler.started(chunks)
            for request in started.generating:
                if self._is_here(request):
                    request.expect_token(is_full=self._room(request) <= 1)
            self._in_flight = _InFlight(chunks, started)

    def _finish_flight(self) -> bool:
        """Waits for the step that runs and commits it; False if it failed and was run again."""
        flight, self._in_flight = self._in_flight, None
        if flight is None:
            return True
        # Requests may have been preempted or ended meanwhile, by a client or the scheduler.
        alive = [chunk for chunk in flight.chunks if self._is_here(chunk.request)]
        for chunk in alive:
            chunk.request.settle_token()
        try:
            result = self.runner.finish(flight.step)
        except Exception as error:
            self._faults.failed("model", error)
            again = [chunk for chunk in alive if self._scheduler.undo_start(chunk)]
            if again:
                self._run_one_by_one(again, error)
            return False
        self._faults.worked("model")
        self._commit(alive, result)
        return True

    def _is_here(self, request: Request) -> bool:
        """Whether it has not ended."""
        return self._requests.get(request.id) is request

    def _run_chunks(self, chunks: Sequence[ScheduledChunk]) -> None:
        try:
            result = self.runner.run(chunks)
        except RankLost:
            raise  # no request is to blame, and nothing can be computed any more
        except Exception as error:
            self._faults.failed("model", error)
            self._run_one_by_one(chunks, error)
            return
        self._faults.worked("model")
        self._commit_run(chunks, result)

    def _run_one_by_one(self, chunks: Sequence[ScheduledChunk], cause: Exception) -> None:
        """A step failed: finds the guilty request by running each alone; the others go on."""
        _log.error("a step of %d requests failed: %s; trying each alone", len(chunks), cause)
        n_failed = 0
        for chunk in chunks:
            if isinstance(cause, torch.OutOfMemoryError):
                self.runner.release_cached_memory()
            try:
                self._commit_run([chunk], self.runner.run([chunk]))
            except Exception as error:
                _log.exception("request %s failed", chunk.request.id)
                n_failed += 1
                self._end(chunk.request, FinishReason.ERROR, error=_failed(chunk.request, error))
        if n_failed == len(chunks):
            self._probe()

    def _probe(self) -> None:
        """Called when every request of a step failed. Raises if the device is broken.

        If only the requests were bad, the engine goes on.
        """
        for attempt in range(1, _N_PROBES + 1):
            try:
                self.runner.probe()
                return
            except Exception as error:
                _log.error("the model does not run: %s (probe %d)", error, attempt)
                cause = error
        raise RuntimeError(f"the model does not run any more: {cause}") from cause

    def _commit_run(self, chunks: Sequence[ScheduledChunk], result: StepResult) -> None:
        self._scheduler.started(chunks)
        self._commit(chunks, result)

    def _commit(self, chunks: Sequence[ScheduledChunk], result: StepResult) -> None:
        self._scheduler.commit(chunks)
        for chunk in chunks:
            request = chunk.request
            request.prompt_logprobs += result.prompt_logprobs.get(request.id, ())
            sampled = result.sampled.get(request.id)
            if sampled is not None:
                self._append(request, sampled)
            elif request.source.pooling is not None:
                self._pool(chunk, request.source.pooling, result.pooled.get(request.id))

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
            self._end(request, FinishReason.ERROR, error=_too_complex(constraint.error))
            return
        if sampled.error is not None:
            self._end(request, FinishReason.ERROR, error=sampled.error)
            return
        is_end = token in self.eos_token_ids and (constraint is not None or not params.ignore_eos)
        if is_end or token in params.stop_token_ids:
            self._end(request, FinishReason.STOP, stop_token=token)
            return
        request.token_ids.append(token)
        logprobs = () if sampled.logprobs is None else (sampled.logprobs,)
        if constraint is not None:
            self.stats.forced(constraint.forced is not None)
            constraint.accept(token)
            self._feed_forced(request, constraint, self._room(request))
        if constraint is not None and constraint.error is not None:
            self._end(request, FinishReason.ERROR, error=_too_complex(constraint.error))
        elif constraint is not None and constraint.ended:
            self._end(request, FinishReason.STOP, logprobs=logprobs)
        elif self._room(request) <= 0:
            self._end(request, FinishReason.LENGTH, logprobs=logprobs)
        else:
            self._emit(request, logprobs=logprobs)

    def _room(self, request: Request) -> int:
        """Tokens that the answer may still get."""
        n_output = request.source.sampling.max_tokens - request.n_output
        return min(n_output, self._max_model_len - request.n_tokens)

    def _feed_forced(self, request: Request, constraint: Constraint, room: int) -> None:
        """Tokens that the grammar leaves no choice about: the next step computes them together.

        With log-probabilities they come one by one, since each needs the logits before it, and
        with bad words, which may forbid them.
        """
        params = request.source.sampling
        if params.logprobs is not None or params.bad_words or not self._feeds_forced:
            return
        forced = constraint.take_forced(room, params.stop_token_ids | self.eos_token_ids)
        request.token_ids += forced
        self.stats.forced(len(forced))

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
            queue_s=request.queue_s,
            prompt_logprobs=_prompt_logprobs(request) if is_first else (),
            pooled=pooled,
        )
        self._output_router.put(request, event)

    def _fail_all(self, error: EngineError) -> None:
        for request in list(self._requests.values()):
            self._end(request, FinishReason.ERROR, error=error)
        self._output_router.flush()

    def _close(self, error: EngineError) -> None:
        """Ends the thread: all who wait get an answer or an error, later messages are refused.

        Touches neither the scheduler nor the device, which may be what broke.
        """
        for message in self._inbox.close(error):
            if isinstance(message, Submit):
                self._requests[message.request.id] = message.request
            elif isinstance(message, Unload):
                message.freed_bytes.send(0)
        for request in self._requests.values():
            self._emit(request, finish=FinishReason.ERROR, error=error)
        self._requests.clear()
        self._output_router.flush()


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A step that the device computes."""

    chunks: Sequence[ScheduledChunk]
    step: StartedStep

    @property
    def is_needed_next(self) -> bool:
        """Whether no step can be prepared before its tokens are known.

        Grammars, penalties, biases and forbidden tokens follow the tokens before.
        """
        return any(
            request.constraint is not None or is_adjusted(request)
            for request in self.step.generating
        )


def _failed(request: Request, error: Exception) -> EngineError:
    """What the listener is told; other errors' messages are for the log: they may name anything."""
    if isinstance(error, EngineError):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return EngineError(
            "the device has too little memory for this request; send a shorter prompt, or start "
            "the server with a lower --max-step-tokens or --gpu-memory-utilization"
        )
    return EngineError(
        f"the model failed on this request; try again, and see the server's log under {request.id}"
    )


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
