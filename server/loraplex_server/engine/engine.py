"""The engine: one thread that owns the device and turns requests into tokens."""

from __future__ import annotations

import asyncio
import logging
import queue
import secrets
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from loraplex_adapter_store.plan import AdapterPlan

from .adapter_packer import AdapterPacker
from .client import STEP_TOKENS, EngineStats, GenerationRequest, Listener
from .config import EngineConfig
from .device_pool import DevicePool, Placement
from .errors import (
    ContextOverflow,
    EngineDead,
    EngineDraining,
    EngineError,
    QueueFull,
)
from .events import FinishReason, TokenEvent, TokenLogprobs
from .expert_monitor import ExpertMonitor
from .kv_cache import KvCache
from .model_runner import ModelRunner, StepResult
from .output_router import OutputRouter
from .request import Request
from .sampler import Sampled
from .scheduler import ScheduledChunk, Scheduler
from .wait_queue import Admission

__all__ = ["Engine"]

_log = logging.getLogger(__name__)

_IDLE_HEARTBEAT_S = 1.0
_N_PREFETCH = 8  # waiting requests whose adapters are loaded ahead
_MAX_FAILED_STEPS = 3  # in a row, with every request of the step failing: the engine is broken


@dataclass(slots=True, eq=False)
class _Tracked:
    """A request and the event loop that listens to it."""

    request: Request
    loop: asyncio.AbstractEventLoop
    prompt_logprobs: list[TokenLogprobs | None]
    is_queued: bool = True  # counts against max_queue


Message = Callable[[], None]  # what the inbox holds: runs on the engine thread


class Engine:
    """See ``client.EngineClient`` for the contract of the public methods.

    Threads meet at two doors: ``submit`` and ``cancel`` put messages into the inbox, the outbox
    calls back into the event loops. Everything else here runs on the engine thread.
    """

    def __init__(
        self,
        runner: ModelRunner,
        kv_cache: KvCache,
        adapters: DevicePool,
        config: EngineConfig,
        *,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        inbox: queue.SimpleQueue[Message],
        n_threads: int,
        max_step_tokens: int,
    ) -> None:
        self._runner = runner
        self._kv = kv_cache
        self._adapters = adapters
        self._config = config
        self._max_model_len = max_model_len
        self._eos_token_ids = eos_token_ids
        self._inbox = inbox
        self._output_router = OutputRouter()
        self._scheduler = Scheduler(
            kv_cache,
            max_batch_size=config.max_batch_size,
            max_step_tokens=max_step_tokens,
            ensure_resident=self._ensure_resident,
            on_admit=self._on_admit,
            on_leave=self._on_leave,
        )
        self._tracked: dict[str, _Tracked] = {}
        # By request id: prefetch and admission may both find out in one step.
        self._unplaceable: dict[str, tuple[Request, EngineError]] = {}
        self._door = threading.Lock()  # guards _n_queued, _draining, _dead and _ids
        self._ids: set[str] = set()
        self._n_queued = 0
        self._draining = False
        self._dead: EngineDead | None = None
        self._stopping = False
        self._n_threads = n_threads
        self._started = threading.Event()
        self._n_failed_steps = 0
        self._n_prompt_tokens = 0
        self._n_generated_tokens = 0
        self._n_step_tokens = 0
        self._steps_by_tokens = [0] * (len(STEP_TOKENS) + 1)
        self._stats = EngineStats()
        self.experts = ExpertMonitor()  # safe from any thread
        self._heartbeat = time.monotonic()
        self._finished_at: list[float] = []  # of recent requests, to estimate Retry-After
        self._thread = threading.Thread(target=self._run, name="loraplex-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread. It keeps torch's threads; whoever calls, and later threads, get one.

        Otherwise every worker of the front would bring its own team of compute threads.
        """
        self._thread.start()
        self._started.wait()
        torch.set_num_threads(1)

    def submit(self, request: GenerationRequest, listener: Listener) -> None:
        tracked = _Tracked(self._new_request(request, listener), asyncio.get_running_loop(), [])
        with self._door:
            if self._dead is not None:
                raise self._dead
            if self._draining:
                raise EngineDraining("the server is shutting down; send the request elsewhere")
            if self._n_queued >= self._config.max_queue:
                raise QueueFull(
                    f"{self._n_queued} requests are waiting, the limit is "
                    f"{self._config.max_queue}; try again later or raise --max-queue",
                    self._retry_after_s(),
                )
            if request.request_id in self._ids:
                raise EngineError(f"request id {request.request_id!r} is already running")
            self._ids.add(request.request_id)
            self._n_queued += 1
        self._inbox.put(lambda: self._accept(tracked))

    def cancel(self, request_id: str) -> None:
        self._inbox.put(lambda: self._cancel(request_id))

    def set_pinned(self, digest: str, pinned: bool) -> None:
        """Keeps an adapter on the device once it is there, or lets it go again."""
        self._inbox.put(lambda: self._adapters.set_pinned(digest, pinned))

    def warm(self, plan: AdapterPlan) -> None:
        """Starts loading an adapter before anybody asks for it."""
        self._inbox.put(lambda: self._adapters.warm(plan))

    @property
    def packer(self) -> AdapterPacker:
        """Makes the form in which adapters wait in host memory: placing them is then one copy."""
        return self._adapters.packer

    async def unload(self, digest: str) -> int:
        """Frees an idle adapter's place on the device; returns the bytes, 0 if absent or in use."""
        loop = asyncio.get_running_loop()
        freed: asyncio.Future[int] = loop.create_future()

        def drop() -> None:
            n_bytes = self._adapters.drop(digest)
            loop.call_soon_threadsafe(_answer, freed, n_bytes)

        self._inbox.put(drop)
        return await freed

    def stats(self) -> EngineStats:
        return replace(self._stats, step_age_s=time.monotonic() - self._heartbeat)

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def alive(self) -> bool:
        return self._dead is None and self._thread.is_alive()

    async def drain(self, timeout_s: float) -> bool:
        with self._door:
            self._draining = True
        deadline = time.monotonic() + timeout_s
        while self._ids and self.alive and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        if not self._ids:
            return True
        self._inbox.put(lambda: self._fail_all(EngineDraining("the server went down")))
        while self._ids and self.alive:
            await asyncio.sleep(0.005)
        return False

    def close(self) -> None:
        """Stops the thread; whoever still listens gets a final error event."""
        self._inbox.put(self._stop)
        if self._thread.is_alive():
            self._thread.join()
        self._adapters.close()

    def _new_request(self, source: GenerationRequest, listener: Listener) -> Request:
        """Raises ContextOverflow if the request can never run."""
        n_virtual = 0
        if source.adapter is not None:
            plan = source.adapter.plan
            if plan.prefix is not None:
                n_virtual = plan.prefix.n_virtual
        token_ids = [-1 - index for index in range(n_virtual)] + list(source.prompt_ids)
        if not source.prompt_ids:
            raise ContextOverflow("the prompt is empty; send at least one token")
        if len(token_ids) >= self._max_model_len:
            raise ContextOverflow(
                f"the prompt has {len(token_ids)} tokens, the context holds {self._max_model_len} "
                "with at least one to generate; shorten the prompt or raise --max-model-len"
            )
        seed = source.sampling.seed
        return Request(
            source=source,
            listener=listener,
            token_ids=token_ids,
            n_prompt=len(token_ids),
            n_virtual=n_virtual,
            seed=secrets.randbits(63) if seed is None else seed,
        )

    def _retry_after_s(self) -> float:
        """Time for the queue to shrink by a tenth at the recent pace, between 1 and 60 s."""
        recent = self._finished_at
        if len(recent) < 2 or recent[-1] <= recent[0]:
            return 1.0
        pace = (len(recent) - 1) / (recent[-1] - recent[0])
        return min(60.0, max(1.0, 0.1 * self._config.max_queue / pace))

    def _run(self) -> None:
        # Counted per thread, but a thread's first parallel operator takes over what any thread set
        # last; asking first gets that behind us, and then nobody else can change it.
        torch.get_num_threads()
        torch.set_num_threads(self._n_threads)
        try:
            try:
                self._runner.warm_up()
            finally:
                self._started.set()
            while not self._stopping:
                self._step()
            self._fail_all(EngineDraining("the server went down"))
        except BaseException as error:
            _log.exception("the engine thread died")
            self._die(error)

    def _step(self) -> None:
        self._read_inbox()
        self._adapters.publish_arrived()
        for request in self._scheduler.waiting.upcoming(_N_PREFETCH):
            if request.source.adapter is not None:
                self._ensure_resident(request)
        chunks = self._scheduler.schedule()
        for request, error in self._unplaceable.values():
            self._end(request, FinishReason.ERROR, error=error)
        self._unplaceable.clear()
        if chunks:
            self._run_chunks(chunks)
        self._publish_stats(chunks)
        if chunks:
            self.experts.look(self._adapters.residents, idle=not self._scheduler.running)
        self._output_router.flush()

    def _read_inbox(self) -> None:
        """Takes every message; blocks while there is nothing to run."""
        idle = not self._scheduler.running
        while True:
            self._heartbeat = time.monotonic()
            try:
                message = self._inbox.get(block=idle, timeout=_IDLE_HEARTBEAT_S)
            except queue.Empty:
                if not idle or len(self._scheduler.waiting):
                    return
                continue
            message()
            idle = False
            if self._stopping:
                return

    def _run_chunks(self, chunks: Sequence[ScheduledChunk]) -> None:
        try:
            result = self._runner.run(chunks)
        except Exception as error:
            self._run_one_by_one(chunks, error)
            return
        self._n_failed_steps = 0
        self._commit(chunks, result)

    def _run_one_by_one(self, chunks: Sequence[ScheduledChunk], cause: Exception) -> None:
        """A step failed: finds the guilty request by running each alone; the others go on."""
        _log.error("a step of %d requests failed: %s; trying each alone", len(chunks), cause)
        n_failed = 0
        for chunk in chunks:
            try:
                self._commit([chunk], self._runner.run([chunk]))
            except Exception as error:
                _log.exception("request %s failed", chunk.request.id)
                n_failed += 1
                self._end(
                    chunk.request,
                    FinishReason.ERROR,
                    error=EngineError(f"the model failed on this request: {error}"),
                )
        self._n_failed_steps = self._n_failed_steps + 1 if n_failed == len(chunks) else 0
        if self._n_failed_steps >= _MAX_FAILED_STEPS:
            raise RuntimeError(f"{_MAX_FAILED_STEPS} steps in a row failed whole") from cause

    def _commit(self, chunks: Sequence[ScheduledChunk], result: StepResult) -> None:
        self._scheduler.commit(chunks)
        for chunk in chunks:
            request = chunk.request
            tracked = self._tracked[request.id]
            tracked.prompt_logprobs += result.prompt_logprobs.get(request.id, ())
            sampled = result.sampled.get(request.id)
            if sampled is not None:
                self._append(tracked, sampled)

    def _append(self, tracked: _Tracked, sampled: Sampled) -> None:
        request, params = tracked.request, tracked.request.source.sampling
        token = sampled.token_id
        self._n_generated_tokens += 1
        is_end = token in self._eos_token_ids and not params.ignore_eos
        if is_end or token in params.stop_token_ids:
            self._end(request, FinishReason.STOP, stop_token=token)
            return
        request.token_ids.append(token)
        logprobs = () if sampled.logprobs is None else (sampled.logprobs,)
        if request.n_output >= params.max_tokens or request.n_tokens >= self._max_model_len:
            self._end(request, FinishReason.LENGTH, token_ids=(token,), logprobs=logprobs)
            return
        first = request.n_output == 1
        self._emit(
            tracked,
            TokenEvent(
                request.id,
                (token,),
                logprobs,
                n_cached=max(0, request.n_cached - request.n_virtual),
                queue_s=request.queue_s,
                prompt_logprobs=self._first_prompt_logprobs(tracked) if first else (),
            ),
        )

    def _first_prompt_logprobs(self, tracked: _Tracked) -> tuple[TokenLogprobs | None, ...]:
        request = tracked.request
        if not request.source.sampling.prompt_logprobs:
            return ()
        n_virtual = len(tracked.prompt_logprobs) - (request.n_prompt - request.n_virtual - 1)
        return (None, *tracked.prompt_logprobs[n_virtual:])  # soft prompts were scored, too

    def _end(
        self,
        request: Request,
        reason: FinishReason,
        *,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprobs, ...] = (),
        stop_token: int | None = None,
        error: EngineError | None = None,
    ) -> None:
        """The one way out: frees everything, sends the last event."""
        n_output = request.n_output
        self._scheduler.finish(request)
        tracked = self._tracked.pop(request.id)
        with self._door:
            self._ids.discard(request.id)
            if tracked.is_queued:
                self._n_queued -= 1
        self._finished_at = [*self._finished_at[-63:], time.monotonic()]
        is_first = n_output == len(token_ids)
        self._emit(
            tracked,
            TokenEvent(
                request.id,
                token_ids,
                logprobs,
                finish=reason,
                stop_token=stop_token,
                error=error,
                n_cached=max(0, request.n_cached - request.n_virtual),
                queue_s=request.queue_s,
                prompt_logprobs=self._first_prompt_logprobs(tracked) if is_first else (),
            ),
        )

    def _emit(self, tracked: _Tracked, event: TokenEvent) -> None:
        self._output_router.put(tracked.loop, tracked.request.listener, event)

    def _accept(self, tracked: _Tracked) -> None:
        request = tracked.request
        self._tracked[request.id] = tracked
        n_most = min(request.n_prompt + request.source.sampling.max_tokens, self._max_model_len)
        if self._kv.pages_for(n_most) > self._kv.n_pages:
            self._scheduler.add(request)
            self._end(
                request,
                FinishReason.ERROR,
                error=ContextOverflow(
                    f"prompt and output need {n_most} tokens of KV memory, the server has "
                    f"{self._kv.n_pages * self._kv.page_size}; ask for less or raise --kv-memory"
                ),
            )
            return
        self._scheduler.add(request)

    def _cancel(self, request_id: str) -> None:
        tracked = self._tracked.get(request_id)
        if tracked is not None:
            self._end(tracked.request, FinishReason.CANCELLED)

    def _ensure_resident(self, request: Request) -> Admission:
        adapter = request.source.adapter
        if adapter is None:
            return Admission.ADMITTED
        try:
            placement = self._adapters.place(adapter.plan)
        except EngineError as error:
            self._unplaceable[request.id] = (request, error)
            return Admission.FAILED
        if placement is Placement.RESIDENT:
            return Admission.ADMITTED
        if placement is Placement.LOADING:
            return Admission.LOADING
        return Admission.NO_ADAPTER_PLACE

    def _on_admit(self, request: Request, first: bool) -> None:
        digest = request.adapter_digest
        if digest:
            self._adapters.hold(digest)
            prefix = self._adapters.resident(digest).parts.prefix
            if prefix is not None and prefix.keys and request.n_computed < request.n_virtual:
                self._kv.write_prefix(request.id, prefix.keys, prefix.values)
                request.n_computed = request.n_virtual
        if first:
            self._n_prompt_tokens += request.n_prompt - request.n_virtual
            self._tracked[request.id].is_queued = False
            with self._door:
                self._n_queued -= 1

    def _on_leave(self, request: Request) -> None:
        if request.adapter_digest:
            self._adapters.release(request.adapter_digest)

    def _fail_all(self, error: EngineError) -> None:
        for tracked in list(self._tracked.values()):
            self._end(tracked.request, FinishReason.ERROR, error=error)
        self._output_router.flush()

    def _stop(self) -> None:
        self._stopping = True
        with self._door:
            self._draining = True

    def _die(self, cause: BaseException) -> None:
        """The thread is lost: everybody hears it, the door closes, /health turns 503."""
        dead = EngineDead(f"the engine stopped: {cause}")
        with self._door:
            self._dead = dead
            self._ids.clear()
        for tracked in self._tracked.values():
            event = TokenEvent(tracked.request.id, (), finish=FinishReason.ERROR, error=dead)
            self._emit(tracked, event)
        self._tracked.clear()
        while True:  # whoever came through the door before it closed
            try:
                message = self._inbox.get_nowait()
            except queue.Empty:
                break
            self._refuse(message, dead)
        self._output_router.flush()

    def _refuse(self, message: Message, dead: EngineDead) -> None:
        before = set(self._tracked)
        try:
            message()
        except Exception:
            _log.exception("a message to the dead engine failed")
        for request_id in set(self._tracked) - before:
            tracked = self._tracked.pop(request_id)
            event = TokenEvent(request_id, (), finish=FinishReason.ERROR, error=dead)
            self._emit(tracked, event)

    def _publish_stats(self, chunks: Sequence[ScheduledChunk]) -> None:
        scheduler = self._scheduler
        if chunks:
            n_tokens = sum(chunk.n_tokens for chunk in chunks)
            self._n_step_tokens += n_tokens
            self._steps_by_tokens[bisect_left(STEP_TOKENS, n_tokens)] += 1
        running = Counter(r.adapter_digest for r in scheduler.running)
        waiting = Counter(r.adapter_digest for r in scheduler.waiting)
        self._stats = EngineStats(
            n_running=len(scheduler.running),
            n_waiting=len(scheduler.waiting),
            kv_pages_used=self._kv.n_pages_held,
            kv_pages_total=self._kv.n_pages,
            n_steps=sum(self._steps_by_tokens),
            n_step_tokens=self._n_step_tokens,
            steps_by_tokens=tuple(self._steps_by_tokens),
            n_prompt_tokens=self._n_prompt_tokens,
            n_generated_tokens=self._n_generated_tokens,
            n_preemptions=scheduler.n_preemptions,
            prefix_queries=self._kv.n_queried,
            prefix_hits=self._kv.n_found,
            pool_bytes_used=self._adapters.pool.bytes_used,
            pool_bytes_total=self._adapters.pool.bytes_total,
            n_adapter_loads=self._adapters.n_loads,
            n_adapter_evictions=self._adapters.n_evictions,
            adapter_load_seconds=self._adapters.load_seconds,
            running_adapters=running,
            waiting_adapters=waiting,
            resident_adapters=self._adapters.resident_digests,
        )


def _answer(future: asyncio.Future[int], value: int) -> None:
    if not future.done():
        future.set_result(value)
