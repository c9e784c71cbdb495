"""An ``EngineClient`` in a gateway, over the engine replicas of the cluster.

    submit ── task ── router ── replica ── lists of events ── listener

If a replica dies before its first event, the request is tried on another. If it dies later, the
request ends with an error: another replica could not go on in the middle.
"""

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextvars import Context
from dataclasses import fields, replace
from hashlib import blake2b

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from loraplex_adapter_store.leasing import AdapterLease
from loraplex_server.cluster.replica.engine_facts import EngineFacts
from loraplex_server.cluster.replica.remote_request import (
    RemoteAdapter,
    RemoteRequest,
    ReplicaStats,
)
from loraplex_server.engine.errors import EngineDead, EngineDraining, EngineError
from loraplex_server.engine.requests.client import (
    EngineStats,
    GenerationRequest,
    Listener,
    TenantStats,
)
from loraplex_server.engine.requests.events import FinishReason, TokenEvent

_N_RETRIES = 2  # of a request without output
_RETRY_S = 0.25  # before the first retry; then twice that
_POLL_S = 1.0  # between two polls of all replicas
_ANSWER_TIMEOUT_S = 5.0
_START_TOKENS = 64  # prompts that share so many go to the same replica of an adapter
_REPLICA_ERRORS = (EngineDead, EngineDraining)  # errors of a replica, not of a request
_log = logging.getLogger(__name__)


class _ReplicaGone(Exception):
    """The replica answers, but its engine does not."""


class RemoteEngine:
    """An ``EngineClient`` and ``DeviceTier``. Event loop only."""

    def __init__(
        self, handle: DeploymentHandle, everybody: DeploymentHandle, facts: EngineFacts
    ) -> None:
        """``everybody``: a second handle of the deployment, for broadcasts.

        A handle counts the calls that wait on each replica, and Ray forgets a count that has not
        changed for ten seconds. Broadcasts each second on the same handle would keep a wrong count
        for ever: after an overload a replica would seem full to gateways that sent it nothing.
        """
        self._handle = handle
        self._stream = handle.options(stream=True, method_name="generate")
        self._everybody = everybody
        self._facts = facts
        self._running: dict[str, asyncio.Task[None]] = {}
        self._replicas: Mapping[str, ReplicaStats] = {}
        self._polled_at = time.monotonic()
        self._is_draining = False
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio holds no references
        self._loop = asyncio.get_running_loop()
        self._polling = self._loop.create_task(self._poll())

    def submit(self, request: GenerationRequest, listener: Listener) -> None:
        """Raises EngineDraining or EngineError. A replica's refusal comes as the last event."""
        if self._is_draining:
            raise EngineDraining("the server is shutting down; send the request elsewhere")
        if request.request_id in self._running:
            raise EngineError(f"request id {request.request_id!r} is already running")
        # Own context: Ray takes calls within one HTTP request for one call, and its router then
        # answers only the first of several choices.
        task = self._loop.create_task(self._run(request, listener), context=Context())
        self._running[request.request_id] = task
        self._tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if task.cancelled():  # before the first step
                self._running.pop(request.request_id, None)
                listener(_cancelled(request.request_id))

        task.add_done_callback(done)

    def cancel(self, request_id: str) -> None:
        task = self._running.get(request_id)
        if task is not None:
            task.cancel()

    def stats(self) -> EngineStats:
        """Return the sum of all replicas, about a second old at most."""
        return summed([replica.engine for replica in self._replicas.values()])

    @property
    def replicas(self) -> Sequence[ReplicaStats]:
        """The last report of each replica."""
        return list(self._replicas.values())

    @property
    def age_s(self) -> float:
        """Return the seconds since the last poll that renewed ``replicas``."""
        return time.monotonic() - self._polled_at

    def n_queued(self, tenant: str) -> int:
        shares = (share for replica in self.replicas for share in replica.engine.tenants)
        return sum(share.n_waiting for share in shares if share.tenant == tenant)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self._facts.eos_token_ids

    @property
    def max_model_len(self) -> int:
        return self._facts.max_model_len

    @property
    def alive(self) -> bool:
        """True while requests are accepted. If no replica runs, requests wait for one to start."""
        return not self._polling.done()

    async def drain(self, timeout_s: float) -> bool:
        self._is_draining = True
        running = list(self._running.values())
        if running:
            _, late = await asyncio.wait(running, timeout=timeout_s)
            for task in late:
                task.cancel()
            return not late
        return True

    async def close(self) -> None:
        self._polling.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._polling

    def set_pinned(self, digest: str, pinned: bool) -> None:
        """Does nothing: replicas read pins from the catalogue."""

    def warm(self, adapter: AdapterLease) -> None:
        """Warm the replica that the router would choose. Any thread."""
        remote = RemoteAdapter.of(adapter)
        handle = self._handle.options(method_name="warm", multiplexed_model_id=adapter.digest)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(lambda: self._in_background(handle.remote(remote)))

    async def unload(self, digest: str) -> int:
        """Return the bytes that all replicas freed. ``stats`` is up to date afterwards."""
        freed = await self.ask_all("unload", digest)
        await self._refresh()
        return sum(n_bytes for n_bytes in freed if isinstance(n_bytes, int))

    async def ask_all(self, method: str, *arguments: object) -> Sequence[object]:
        """Return the answers of all replicas; none if a replica does not answer in time."""
        try:
            answers = self._everybody.broadcast(method, *arguments)
            return list(await answers.results_async(timeout_s=_ANSWER_TIMEOUT_S))
        except (RayError, RayServeException, TimeoutError) as error:
            _log.info("%s: a replica does not answer: %s", method, error)
            return ()

    async def _run(self, request: GenerationRequest, listener: Listener) -> None:
        """Pass events to ``listener``, always ending with one final event."""
        ended = False

        def deliver(event: TokenEvent) -> None:
            nonlocal ended
            ended = event.finish is not None
            if ended:
                self._running.pop(request.request_id, None)
            listener(replace(event, request_id=request.request_id))

        try:
            await self._with_retries(
                RemoteRequest.of(request, self._facts.base.fingerprint), deliver
            )
            if not ended:
                cause = EngineDead("the engine replica stopped in the middle of the answer")
                deliver(_failure(request.request_id, cause))
        except asyncio.CancelledError:
            if not ended:
                deliver(_cancelled(request.request_id))
        except Exception:  # the message may be a traceback of a replica
            _log.exception("request %s failed on its way to an engine", request.request_id)
            if not ended:
                failure = EngineError("the server's log has the details; report it if it stays")
                deliver(_failure(request.request_id, failure))

    async def _with_retries(
        self, request: RemoteRequest, deliver: Callable[[TokenEvent], None]
    ) -> None:
        request_id = request.request.request_id
        for attempt in range(_N_RETRIES + 1):
            n_lists = 0
            try:
                async with contextlib.aclosing(self._lists(request)) as lists:
                    async for events in lists:
                        if not n_lists and isinstance(events[0].error, _REPLICA_ERRORS):
                            raise _ReplicaGone(str(events[0].error))
                        n_lists += 1
                        for event in events:
                            deliver(event)
                return
            except (RayError, RayServeException, _ReplicaGone) as error:
                if isinstance(error, RayTaskError):
                    raise  # a mistake in the replica's code, not its death
                cause = f"{type(error).__name__}: the engine replica of this request was lost"
                _log.warning("request %s, attempt %d: %s", request_id, attempt + 1, error)
                if n_lists or attempt == _N_RETRIES:
                    deliver(_failure(request_id, EngineDead(cause)))
                    return
            await asyncio.sleep(_RETRY_S * 2**attempt)

    async def _lists(self, request: RemoteRequest) -> AsyncGenerator[list[TokenEvent]]:
        """Yield the replica's lists. Closing early cancels the request there."""
        handle = self._stream
        if request.adapter is not None:
            handle = handle.options(multiplexed_model_id=request.adapter.digest)
        response: DeploymentResponseGenerator = handle.remote(_start_of(request.request), request)
        ended = False
        try:
            async for events in response:
                ended = events[-1].finish is not None
                yield events
        finally:
            if not ended:
                response.cancel()

    async def _poll(self) -> None:
        while True:
            await self._refresh()
            await asyncio.sleep(_POLL_S)

    async def _refresh(self) -> None:
        started = time.monotonic()
        answers = await self.ask_all("stats")
        if started < self._polled_at:
            return  # a later poll has ended first
        stats = {each.replica: each for each in answers if isinstance(each, ReplicaStats)}
        if stats or self.age_s > _ANSWER_TIMEOUT_S:
            self._replicas = stats
        if stats:
            self._polled_at = started

    def _in_background(self, work: Awaitable[object]) -> None:
        async def run() -> None:
            try:
                await work
            except Exception as error:
                _log.warning("a message to the engine replicas failed: %s", error)

        task = self._loop.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _cancelled(request_id: str) -> TokenEvent:
    return TokenEvent(request_id, (), finish=FinishReason.CANCELLED)


def _failure(request_id: str, error: EngineError) -> TokenEvent:
    return TokenEvent(request_id, (), finish=FinishReason.ERROR, error=error)


def _start_of(request: GenerationRequest) -> str:
    """Return a hash that is equal for prompts with the same start. It reveals no text."""
    start = repr((request.cache_salt, request.prompt_ids[:_START_TOKENS]))
    return blake2b(start.encode(), digest_size=16).hexdigest()


def summed(engines: Sequence[EngineStats]) -> EngineStats:
    """Add counts and bytes, join digests, and take the slowest engine's ``step_age_s``."""
    if not engines:
        return EngineStats()
    numbers = [f.name for f in fields(EngineStats) if isinstance(f.default, int | float)]
    sums = {name: sum(getattr(engine, name) for engine in engines) for name in numbers}
    tenants: dict[str, list[TenantStats]] = {}
    for engine in engines:
        for share in engine.tenants:
            tenants.setdefault(share.tenant, []).append(share)
    return EngineStats(
        **sums | {"step_age_s": max(engine.step_age_s for engine in engines)},
        steps_by_tokens=tuple(map(sum, zip(*(e.steps_by_tokens for e in engines), strict=True))),
        tenants=tuple(
            TenantStats(name, *map(sum, zip(*(share[1:] for share in shares), strict=True)))
            for name, shares in tenants.items()
        ),
        running_adapters=_added(engine.running_adapters for engine in engines),
        waiting_adapters=_added(engine.waiting_adapters for engine in engines),
        resident_adapters=tuple({d: None for e in engines for d in e.resident_adapters}),
        resident_bytes=_added(engine.resident_bytes for engine in engines),
        resident_load_s={d: s for e in engines for d, s in e.resident_load_s.items()},
    )


def _added(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return total
