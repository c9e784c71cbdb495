"""The engine as a gateway has it: a handle to replicas, behind the contract of an engine client.

    submit ── task ── router ── replica ── lists of events ── listener

A replica that dies before it has said anything loses nothing: the request is tried elsewhere. One
that dies later ends its requests with an error, since nobody could go on in the middle.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextvars import Context
from dataclasses import replace
from hashlib import blake2b

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from loraplex_adapter_store.lease import AdapterLease
from loraplex_server.engine.client import EngineStats, GenerationRequest, Listener
from loraplex_server.engine.errors import EngineDead, EngineDraining, EngineError
from loraplex_server.engine.events import FinishReason, TokenEvent

from .engine_facts import EngineFacts
from .fleet_stats import summed
from .remote_request import RemoteAdapter, RemoteRequest, ReplicaStats

__all__ = ["RemoteEngine"]

_N_RETRIES = 2  # of a request that had no output yet
_RETRY_S = 0.25  # before the first; then twice that
_POLL_S = 1.0  # between two looks at all replicas
_POLL_LIMIT_S = 5.0
_START_TOKENS = 64  # what two prompts must share to be sent to the same holder
_GONE = (EngineDead, EngineDraining)  # errors of a replica, not of a request
_log = logging.getLogger(__name__)


class _ReplicaGone(Exception):
    """A replica that answers, and whose engine does not."""


class RemoteEngine:
    """See ``EngineClient`` and ``DeviceTier`` for the contract. Lives on one event loop."""

    def __init__(
        self, handle: DeploymentHandle, everybody: DeploymentHandle, facts: EngineFacts
    ) -> None:
        """``everybody``: another handle of the deployment, for what is asked of all replicas.

        A handle counts the calls that wait on a replica, a count that Ray forgets when it has not
        changed for ten seconds. Looks at everybody each second would keep a wrong one for ever:
        after an overload a replica seemed full to a gateway that had not sent what filled it.
        """
        self._handle = handle
        self._stream = handle.options(stream=True, method_name="generate")
        self._everybody = everybody
        self._facts = facts
        self._running: dict[str, asyncio.Task[None]] = {}
        self._replicas: Mapping[str, ReplicaStats] = {}
        self._asked_at = time.monotonic()
        self._is_draining = False
        self._tasks: set[asyncio.Task[None]] = set()  # asyncio itself keeps none
        self._loop = asyncio.get_running_loop()
        self._polling = self._loop.create_task(self._poll())

    def submit(self, request: GenerationRequest, listener: Listener) -> None:
        """Raises EngineDraining or EngineError; what a replica refuses comes as a last event."""
        if self._is_draining:
            raise EngineDraining("the server is shutting down; send the request elsewhere")
        if request.request_id in self._running:
            raise EngineError(f"request id {request.request_id!r} is already running")
        # In a context of its own: Ray takes calls from within one HTTP request for one call, and
        # its router then answers the first of several choices only.
        task = self._loop.create_task(self._run(request, listener), context=Context())
        self._running[request.request_id] = task
        self._tasks.add(task)

        def done(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            if task.cancelled():  # before its first step
                self._running.pop(request.request_id, None)
                listener(_cancelled(request.request_id))

        task.add_done_callback(done)

    def cancel(self, request_id: str) -> None:
        task = self._running.get(request_id)
        if task is not None:
            task.cancel()

    def stats(self) -> EngineStats:
        """Of all replicas together, at most a second or so old."""
        return summed([replica.engine for replica in self._replicas.values()])

    @property
    def replicas(self) -> Sequence[ReplicaStats]:
        """What each replica said last."""
        return list(self._replicas.values())

    @property
    def age_s(self) -> float:
        """Since they were asked for what ``replicas`` says."""
        return time.monotonic() - self._asked_at

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
        """Whether requests are taken: without a replica they wait for the next one."""
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
        """Nothing: every replica sees in the catalogue what is pinned."""

    def warm(self, adapter: AdapterLease) -> None:
        """On the replica that the router would take; any thread."""
        remote = RemoteAdapter.of(adapter)
        handle = self._handle.options(method_name="warm", multiplexed_model_id=adapter.digest)
        self._on_loop(lambda: self._in_background(handle.remote(remote)))

    async def unload(self, digest: str) -> int:
        """The bytes that all replicas freed together. ``stats`` tells of it by then."""
        freed = await self.ask_all("unload", digest)
        await self._look()
        return sum(n_bytes for n_bytes in freed if isinstance(n_bytes, int))

    async def ask_all(self, method: str, *arguments: object) -> Sequence[object]:
        """What all replicas answer; nothing where one of them does not answer in time."""
        try:
            answers = self._everybody.broadcast(method, *arguments)
            return list(await answers.results_async(timeout_s=_POLL_LIMIT_S))
        except (RayError, RayServeException, TimeoutError) as error:
            _log.info("%s: a replica does not answer: %s", method, error)
            return ()

    async def _run(self, request: GenerationRequest, listener: Listener) -> None:
        """Calls ``listener`` with one last event, whatever happens; by then the id is free."""
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
        except Exception:  # its message may be a traceback of a replica
            _log.exception("request %s failed on its way to an engine", request.request_id)
            if not ended:
                unforeseen = EngineError("the server's log has the details; report it if it stays")
                deliver(_failure(request.request_id, unforeseen))

    async def _with_retries(
        self, request: RemoteRequest, deliver: Callable[[TokenEvent], None]
    ) -> None:
        for attempt in range(_N_RETRIES + 1):
            n_lists = 0
            try:
                async with contextlib.aclosing(self._lists(request)) as lists:
                    async for events in lists:
                        if not n_lists and isinstance(events[0].error, _GONE):
                            raise _ReplicaGone(str(events[0].error))
                        n_lists += 1
                        for event in events:
                            deliver(event)
                return
            except (RayError, RayServeException, _ReplicaGone) as error:
                if isinstance(error, RayTaskError):
                    raise  # a mistake in the replica's code, not its death
                cause = f"{type(error).__name__}: the engine replica of this request was lost"
                _log.warning("request %s, attempt %d: %s", request.request_id, attempt + 1, error)
                if n_lists or attempt == _N_RETRIES:
                    deliver(_failure(request.request_id, EngineDead(cause)))
                    return
            await asyncio.sleep(_RETRY_S * 2**attempt)

    async def _lists(self, request: RemoteRequest) -> AsyncGenerator[list[TokenEvent]]:
        """Cancels the request on its replica when it is left early."""
        handle = self._stream
        if request.adapter is not None:
            handle = handle.options(multiplexed_model_id=request.adapter.digest)
        response: DeploymentResponseGenerator = handle.remote(_start_of(request), request)
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
            await self._look()
            await asyncio.sleep(_POLL_S)

    async def _look(self) -> None:
        asked_at = time.monotonic()
        found = await self.ask_all("stats")
        if asked_at < self._asked_at:
            return  # another look began later, and has ended
        stats = {each.replica: each for each in found if isinstance(each, ReplicaStats)}
        if stats or self.age_s > _POLL_LIMIT_S:
            self._replicas = stats
        if stats:
            self._asked_at = asked_at

    def _in_background(self, work: Awaitable[object]) -> None:
        async def run() -> None:
            try:
                await work
            except Exception as error:
                _log.warning("a message to the engine replicas failed: %s", error)

        task = self._loop.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_loop(self, call: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(call)


def _cancelled(request_id: str) -> TokenEvent:
    return TokenEvent(request_id, (), finish=FinishReason.CANCELLED)


def _failure(request_id: str, error: EngineError) -> TokenEvent:
    return TokenEvent(request_id, (), finish=FinishReason.ERROR, error=error)


def _start_of(request: RemoteRequest) -> str:
    """Equal for prompts that begin alike, for the router. Says nothing of the prompt's text."""
    start = repr((request.cache_salt, request.prompt_ids[:_START_TOKENS]))
    return blake2b(start.encode(), digest_size=16).hexdigest()
