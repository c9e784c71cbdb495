"""The engine thread: reads messages, runs steps, sends tokens.

    inbox → scheduler → model runner → output processor → output router

On a GPU the next step is scheduled and launched while the previous one still runs. Then the loop
waits for the tokens of the previous step (``LoopSettings.overlaps``):

    host    schedule 2, start 2 │ wait 1, commit 1 │ schedule 3, start 3 │ wait 2, commit 2 │
    device  1 …                   2 …                                      3 …

``OutputProcessor`` owns the open requests. Everything but the constructor and ``stats`` runs on the
engine thread.
"""

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from loraplex_adapter_store.part_log import worked

from .adapters.device_pool import DevicePool
from .adapters.expert_monitor import ExpertMonitor
from .drafts.drafter import Drafter
from .errors import EngineDead, EngineDraining, EngineError, RankLost
from .memory.kv_cache import KvCache
from .output_processor import OutputProcessor
from .requests.inbox import Inbox, Message, Unload
from .requests.request import Request
from .sampling.token_rules import is_adjusted
from .scheduling.scheduler import ScheduledChunk, Scheduler
from .scheduling.step_stats import StepStats
from .steps.step_runner import StartedStep, StepRunner

_log = logging.getLogger(__name__)

_IDLE_HEARTBEAT_S = 1.0
_N_PREFETCH = 8  # waiting requests whose adapters are loaded ahead
_N_PROBES = 3  # the device counts as broken if all of them fail


@dataclass(frozen=True, slots=True)
class LoopSettings:
    """The settings of the engine thread."""

    max_model_len: int
    eos_token_ids: frozenset[int]
    n_threads: int  # torch's compute threads
    jump_forward: bool = True  # tokens that a grammar forces are computed together
    drafts: bool = False  # guesses of next tokens are verified together; not if steps overlap
    overlaps: bool = False  # a step runs while the next one is scheduled
    arithmetic: AbstractContextManager[object] = nullcontext()  # noqa: RUF009  stateless


class EngineLoop:
    """The body of the engine thread, which calls ``run`` once."""

    def __init__(
        self,
        settings: LoopSettings,
        runner: StepRunner,
        kv_cache: KvCache,
        adapters: DevicePool,
        scheduler: Scheduler,
        inbox: Inbox,
    ) -> None:
        self.settings = settings
        self.runner = runner
        self.kv_cache = kv_cache
        self.adapters = adapters
        self.experts = ExpertMonitor()  # safe from any thread
        self.stats = StepStats(scheduler, kv_cache, adapters)
        self.heartbeat = time.monotonic()  # when the thread last showed life
        self.started = threading.Event()
        self._scheduler = scheduler
        self._inbox = inbox
        self.outputs = OutputProcessor(
            scheduler,
            kv_cache,
            inbox,
            self.stats,
            max_model_len=settings.max_model_len,
            eos_token_ids=settings.eos_token_ids,
            jump_forward=settings.jump_forward,
        )
        self._drafter: Drafter | None = None
        if settings.drafts:
            self._drafter = Drafter(
                kv_cache, self.outputs.n_left, max_step_tokens=scheduler.max_step_tokens
            )
        self._in_flight: _InFlight | None = None
        self._finished = 0.0  # when the last step did
        self._unloads: list[Unload] = []  # not answered yet
        self._is_stopping = False

    def run(self) -> None:
        """Runs until ``stop`` or a device failure, then ends every request with an event."""
        # torch counts threads per thread, but a thread's first call takes the value that any thread
        # set last. Calling ``get`` first fixes that, so no other thread can change it later.
        torch.get_num_threads()
        torch.set_num_threads(self.settings.n_threads)
        try:
            with self.settings.arithmetic:
                try:
                    self.runner.warm_up(self._scheduler.max_step_tokens)
                    self.stats.lost_at_start = self.runner.lost_at_start
                    self.stats.after_step(())
                finally:
                    self.started.set()
                while not self._is_stopping:
                    self._step()
            self._close(EngineDraining("the server went down"))
            self.kv_cache.close(write=True)
        except BaseException:
            _log.exception("the engine thread died")
            self._close(EngineDead("the engine stopped; the server's log says why"))
            self.kv_cache.close(write=False)

    def _step(self) -> None:
        self._read_inbox()
        ends_flight = self._in_flight is not None
        if self._in_flight is not None and self._in_flight.is_needed_next:
            self._finish_step()
        self.adapters.publish_arrived()
        self.kv_cache.move_pages()
        self._scheduler.prefetch(_N_PREFETCH)
        scheduled = self._scheduler.schedule()
        self._inbox.admitted(scheduled.first_admitted)
        for request, error in scheduled.failed:
            self.outputs.fail(request, error)
        chunks: Sequence[ScheduledChunk] = scheduled.chunks
        if self._drafter is not None:
            chunks = self._drafter.add(chunks)
        if self.settings.overlaps:
            self._launch_async(chunks)
        elif chunks:
            self._run_chunks(chunks)
        self.stats.after_step(chunks)
        if chunks or ends_flight:
            self.experts.look(self.adapters.residents, idle=not self._scheduler.running)
        self.outputs.flush()
        self._unload()

    def _read_inbox(self) -> None:
        """Handles every message; waits for the next one while there is nothing to run."""
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
        if isinstance(message, Request):
            self.outputs.accept(message)
        elif isinstance(message, Unload):
            self._unloads.append(message)
        else:
            message()

    def stop(self) -> None:
        """Makes the thread end after this step. Engine thread."""
        self._is_stopping = True

    def lose_rank(self, why: str) -> None:
        """Raises RankLost, which ends the thread. Engine thread."""
        raise RankLost(why)

    def _unload(self) -> None:
        """Unloads adapters as requested. Adapters that are still loading wait for a later step.

        Replies once ``stats`` shows the result.
        """
        loading = [unload for unload in self._unloads if self.adapters.is_loading(unload.digest)]
        if len(loading) == len(self._unloads):
            return
        ready = [unload for unload in self._unloads if unload not in loading]
        n_bytes = [self.adapters.drop(unload.digest) for unload in ready]
        self.stats.after_step(())
        self._unloads = loading
        for unload, freed in zip(ready, n_bytes, strict=True):
            unload.answer(freed)

    def _launch_async(self, chunks: Sequence[ScheduledChunk]) -> None:
        """Launches a step behind the running one, then waits for the running one's tokens."""
        previous, started, failure = self._in_flight, None, None
        began = time.perf_counter()
        if chunks:
            try:
                started = self.runner.start(chunks, None if previous is None else previous.step)
            except RankLost:
                raise  # nothing can be computed any more; the running step cannot finish either
            except Exception as error:
                failure = error
        if not self._finish_step():
            return  # the launched step built on the one that failed
        chunks = [chunk for chunk in chunks if self.outputs.has(chunk.request)]
        if failure is not None:
            self._run_one_by_one(chunks, failure)
        elif started is not None:
            self._scheduler.started(chunks)
            for request in started.generating:
                if self.outputs.has(request):
                    request.add_placeholder(is_full=self.outputs.n_left(request) <= 1)
            self._in_flight = _InFlight(chunks, started, began)

    def _finish_step(self) -> bool:
        """Waits for the running step and commits it. Returns False if it failed and ran again."""
        flight, self._in_flight = self._in_flight, None
        if flight is None:
            return True
        # Requests may have been preempted or ended meanwhile, by a client or the scheduler.
        alive = [chunk for chunk in flight.chunks if self.outputs.has(chunk.request)]
        for chunk in alive:
            chunk.request.remove_placeholder()
        try:
            result = self.runner.finish(flight.step)
        except RankLost:
            raise
        except Exception as error:
            again = [chunk for chunk in alive if self._scheduler.undo_start(chunk)]
            if again:
                self._run_one_by_one(again, error)
            else:
                _log.error("a step failed: %s", error, extra={"part": "model"})
            return False
        worked("model")
        self._measured(flight.chunks, flight.began)
        self.outputs.process(alive, result)
        return True

    def _run_chunks(self, chunks: Sequence[ScheduledChunk]) -> None:
        began = time.perf_counter()
        try:
            result = self.runner.run(chunks)
        except RankLost:
            raise  # no request is to blame, and nothing can be computed any more
        except Exception as error:
            self._run_one_by_one(chunks, error)
            return
        worked("model")
        self._measured(chunks, began)
        self._scheduler.started(chunks)
        self.outputs.process(chunks, result)

    def _measured(self, chunks: Sequence[ScheduledChunk], began: float) -> None:
        """Reports the seconds of a finished step, less those when the device ran the previous."""
        now = time.perf_counter()
        seconds = now - max(began, self._finished)
        self._finished = now
        if not any(chunk.drafts for chunk in chunks):
            self._scheduler.measured(chunks, seconds)
        if self._drafter is not None:
            self._drafter.measured(chunks, seconds)

    def _run_one_by_one(self, chunks: Sequence[ScheduledChunk], cause: Exception) -> None:
        """Runs each request of a failed step alone, so that only the faulty request fails."""
        _log.error(
            "a step of %d requests failed: %s; trying each alone",
            len(chunks),
            cause,
            extra={"part": "model"},
        )
        n_failed = 0
        for chunk in chunks:
            if isinstance(cause, torch.OutOfMemoryError):
                self.runner.release_cached_memory()
            try:
                result = self.runner.run([chunk])
                self._scheduler.started([chunk])
                self.outputs.process([chunk], result)
            except RankLost:
                raise
            except Exception as error:
                _log.exception("request %s failed", chunk.request.id)
                n_failed += 1
                self.outputs.fail(chunk.request, _failed(chunk.request, error))
        if n_failed == len(chunks):
            self._probe()

    def _probe(self) -> None:
        """Raises if the device is broken. Called when every request of a step failed.

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
        """Answers or fails everyone who waits. Later messages are refused."""
        unread = []
        for message in [*self._unloads, *self._inbox.close(error)]:
            if isinstance(message, Request):
                unread.append(message)
            elif isinstance(message, Unload):
                message.answer(0)
        self.outputs.close(unread, error)


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A step that the device is computing."""

    chunks: Sequence[ScheduledChunk]
    step: StartedStep
    began: float

    @property
    def is_needed_next(self) -> bool:
        """Return True if the next step cannot be prepared before this step's tokens are known.

        Grammars, penalties, biases and forbidden tokens depend on the tokens before.
        """
        return any(
            request.constraint is not None or is_adjusted(request)
            for request in self.step.generating
        )


def _failed(request: Request, error: Exception) -> EngineError:
    """Return the error for the listener. Messages of unknown errors stay in the log."""
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
