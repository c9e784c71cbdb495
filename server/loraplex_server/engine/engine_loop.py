"""The engine thread: reads messages, runs steps, sends tokens.

    inbox → scheduler → model runner → answers → output router

Where a device of its own computes, a step is scheduled and given to it while the one before still
runs; then the tokens of that one are waited for (``_overlaps``):

    host    schedule 2, start 2 │ wait 1, commit 1 │ schedule 3, start 3 │ wait 2, commit 2 │
    device  1 …                   2 …                                      3 …

``Answers`` owns the requests while they are here. All but the constructor and ``stats`` runs on the
thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from loraplex_adapter_store.faults import FaultLog, NoFaultLog

from .answers import Answers
from .device_pool import DevicePool
from .errors import EngineDead, EngineDraining, EngineError, RankLost
from .expert_monitor import ExpertMonitor
from .inbox import Inbox
from .kv_cache import KvCache
from .messages import Cancel, FailAll, Lost, Message, SetPinned, Stop, Submit, Unload, Wake, Warm
from .model_runner import ModelRunner, StartedStep
from .request import Request
from .sampler import is_adjusted
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
        self._answers = Answers(
            scheduler,
            kv_cache,
            inbox,
            self.stats,
            max_model_len=max_model_len,
            eos_token_ids=eos_token_ids,
            feeds_forced=forced_tokens,
        )
        self._n_threads = n_threads
        self._overlaps = overlaps
        self._in_flight: _InFlight | None = None
        self._unloads: list[Unload] = []  # not answered yet
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
        ends_flight = self._in_flight is not None
        if self._in_flight is not None and self._in_flight.is_needed_next:
            self._finish_flight()
        self.adapters.publish_arrived()
        self._scheduler.prefetch(_N_PREFETCH)
        scheduled = self._scheduler.schedule()
        self._inbox.admitted(scheduled.first_admitted)
        for request, error in scheduled.failed:
            self._answers.fail(request, error)
        if self._overlaps:
            self._take_off(scheduled.chunks)
        elif scheduled.chunks:
            self._run_chunks(scheduled.chunks)
        self.stats.after_step(scheduled.chunks)
        if scheduled.chunks or ends_flight:
            self.experts.look(self.adapters.residents, idle=not self._scheduler.running)
        self._answers.flush()
        self._unload()

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
                self._answers.accept(request)
            case Cancel(request_id):
                self._answers.cancel(request_id)
            case SetPinned(digest, pinned):
                self.adapters.set_pinned(digest, pinned)
            case Warm(plan):
                self.adapters.warm(plan)
            case Unload():
                self._unloads.append(message)
            case FailAll(error):
                self._answers.fail_all(error)
            case Lost(why):
                raise RankLost(why)
            case Stop():
                self._is_stopping = True
            case Wake():
                pass

    def _unload(self) -> None:
        """Frees what was asked for, but for what is still being loaded: that waits.

        Answers when ``stats`` tells of it.
        """
        loading = [one for one in self._unloads if self.adapters.is_loading(one.digest)]
        if len(loading) == len(self._unloads):
            return
        ready = [one for one in self._unloads if one not in loading]
        n_bytes = [self.adapters.drop(one.digest) for one in ready]
        self.stats.after_step(())
        self._unloads = loading
        for one, freed in zip(ready, n_bytes, strict=True):
            one.freed_bytes.send(freed)

    def _take_off(self, chunks: Sequence[ScheduledChunk]) -> None:
        """Starts a step behind the one that runs, then waits for that one's tokens."""
        before, started, failed = self._in_flight, None, None
        if chunks:
            try:
                started = self.runner.start(chunks, None if before is None else before.step)
            except RankLost:
                raise  # nothing can be computed any more, nor can what runs be finished
            except Exception as error:
                failed = error
        if not self._finish_flight():
            return  # what was started went on from what failed
        chunks = [chunk for chunk in chunks if self._answers.has(chunk.request)]
        if failed is not None:
            self._faults.failed("model", failed)
            self._run_one_by_one(chunks, failed)
        elif started is not None:
            self._scheduler.started(chunks)
            for request in started.generating:
                if self._answers.has(request):
                    request.expect_token(is_full=self._answers.room(request) <= 1)
            self._in_flight = _InFlight(chunks, started)

    def _finish_flight(self) -> bool:
        """Waits for the step that runs and commits it; False if it failed and was run again."""
        flight, self._in_flight = self._in_flight, None
        if flight is None:
            return True
        # Requests may have been preempted or ended meanwhile, by a client or the scheduler.
        alive = [chunk for chunk in flight.chunks if self._answers.has(chunk.request)]
        for chunk in alive:
            chunk.request.settle_token()
        try:
            result = self.runner.finish(flight.step)
        except RankLost:
            raise
        except Exception as error:
            self._faults.failed("model", error)
            again = [chunk for chunk in alive if self._scheduler.undo_start(chunk)]
            if again:
                self._run_one_by_one(again, error)
            return False
        self._faults.worked("model")
        self._answers.take(alive, result)
        return True

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
        self._scheduler.started(chunks)
        self._answers.take(chunks, result)

    def _run_one_by_one(self, chunks: Sequence[ScheduledChunk], cause: Exception) -> None:
        """A step failed: finds the guilty request by running each alone; the others go on."""
        _log.error("a step of %d requests failed: %s; trying each alone", len(chunks), cause)
        n_failed = 0
        for chunk in chunks:
            if isinstance(cause, torch.OutOfMemoryError):
                self.runner.release_cached_memory()
            try:
                result = self.runner.run([chunk])
                self._scheduler.started([chunk])
                self._answers.take([chunk], result)
            except RankLost:
                raise
            except Exception as error:
                _log.exception("request %s failed", chunk.request.id)
                n_failed += 1
                self._answers.fail(chunk.request, _failed(chunk.request, error))
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

    def _close(self, error: EngineError) -> None:
        """Ends the thread: all who wait get an answer or an error, later messages are refused."""
        unread = []
        for message in [*self._unloads, *self._inbox.close(error)]:
            if isinstance(message, Submit):
                unread.append(message.request)
            elif isinstance(message, Unload):
                message.freed_bytes.send(0)
        self._answers.close(unread, error)


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
