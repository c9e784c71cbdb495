"""Sessions of clients that train step by step, and the order of their calls.

    session ──┬─ runs: an adapter that learns, whose calls take their turns by number
              ├─ samplers: the adapter, or the base, that a client samples from
              └─ calls: results that the client fetches later

A session that sends nothing for ``idle_s`` and has no call running ends: its memory is free.
"""

import asyncio
import itertools
import logging
import time
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from loraplex_adapter_store.names.selector import NameRef
from loraplex_server.errors import ApiError, not_found, too_many
from loraplex_server.settings.api_keys import AdapterAccess
from loraplex_training.engine.adapter import LearningAdapter

from .checkpoints import Run

_GAP_S = 60.0  # the longest wait for a call that a client has numbered and not sent
_MAX_SESSIONS, _MAX_CALLS, _MAX_SAMPLERS = 64, 4096, 4096  # of a tenant, of a session
_N_FETCHED = 256  # results of a session that can be fetched again
_MAX_OF_TENANT = 4  # runs, unless the key has ``max_jobs``
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sampler:
    """The adapter or base that a sampling client samples from."""

    id: str
    adapter: NameRef | None  # stored name; None: the base
    path: str | None = None  # of the checkpoint


class TrainingRun:
    """An adapter that learns. Event loop only; the training thread changes the adapter."""

    def __init__(self, run: Run, session: "Session") -> None:
        self.run, self.session = run, session
        self.adapter: LearningAdapter  # set before the first turn
        self._next = 1
        self._is_running = False
        self._waiting: dict[int, asyncio.Future[None]] = {}

    @property
    def id(self) -> str:
        return self.run.id

    async def in_turn(self, number: int, work: Callable[[], Awaitable[_T]]) -> _T:
        """Run ``work`` after all calls with lower numbers. Raises ApiError (409)."""
        if number < self._next:
            raise ApiError(409, f"call {number} has already had its turn", code="out_of_order")
        while number != self._next:
            turn = self._waiting.setdefault(number, asyncio.get_running_loop().create_future())
            await asyncio.wait([turn], timeout=_GAP_S)
            if not (turn.done() or self._is_running):
                raise ApiError(
                    409,
                    f"call {self._next} has not arrived, so call {number} cannot run; start from "
                    "the last checkpoint",
                    code="out_of_order",
                )
        self._is_running = True
        try:
            return await work()
        finally:
            self._is_running, self._next = False, number + 1
            self._waiting.pop(number, None)
            if (following := self._waiting.get(self._next)) is not None and not following.done():
                following.set_result(None)


@dataclass(slots=True, eq=False)
class Session:
    """A client's session. Event loop only."""

    id: str
    tenant: str
    access: AdapterAccess
    metadata: Mapping[str, object] | None = None
    runs: dict[str, TrainingRun] = field(default_factory=dict)
    samplers: dict[str, Sampler] = field(default_factory=dict)
    used: float = field(default_factory=time.monotonic)
    clones: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    cleanups: dict[str, Callable[[], Awaitable[None]]] = field(default_factory=dict)  # at its end
    _calls: OrderedDict[str, asyncio.Task[object]] = field(default_factory=OrderedDict)
    _fetched: OrderedDict[str, None] = field(default_factory=OrderedDict)

    def start(self, call_id: str, work: Callable[[], Coroutine[None, None, object]]) -> None:
        """Start a call, unless it was started before: clients send a call again. Raises ApiError.

        429 if too many results wait to be fetched.
        """
        if call_id in self._calls:
            return
        if len(self._calls) - len(self._fetched) >= _MAX_CALLS:
            raise too_many(
                f"{_MAX_CALLS} calls of this session run or wait to be fetched", "queue_full", 1.0
            )
        self._calls[call_id] = task = asyncio.create_task(work())
        task.add_done_callback(_retrieve)

    def call(self, call_id: str) -> asyncio.Task[object] | None:
        return self._calls.get(call_id)

    @property
    def is_busy(self) -> bool:
        """True while a call runs or waits for its turn."""
        return any(not call.done() for call in self._calls.values())

    def fetched(self, call_id: str) -> None:
        """Keep the result for a client that asks again, but not for ever."""
        self._fetched[call_id] = None
        while len(self._fetched) > _N_FETCHED:
            self._calls.pop(self._fetched.popitem(last=False)[0], None)

    def add_sampler(self, sampler: Sampler) -> Sampler:
        self.samplers[sampler.id] = sampler
        while len(self.samplers) > _MAX_SAMPLERS:
            self.samplers.pop(next(iter(self.samplers)))
        return sampler

    def close(self) -> None:
        for task in self._calls.values():
            task.cancel()
        self.runs.clear()
        self.samplers.clear()


class Sessions:
    """Owner of the sessions of all tenants. Event loop only."""

    def __init__(self, *, max_runs: int, idle_s: float) -> None:
        """``max_runs``: adapters that learn at once. ``idle_s``: life of a silent session."""
        self._max_runs, self._idle_s = max_runs, idle_s
        self._sessions: dict[str, Session] = {}
        self._watching: asyncio.Task[None] | None = None

    def create(
        self, tenant: str, access: AdapterAccess, metadata: Mapping[str, object] | None
    ) -> Session:
        """Raises ApiError (429) for more sessions than a tenant may have."""
        if len(self.of_tenant(tenant)) >= _MAX_SESSIONS:
            raise too_many(
                f"{_MAX_SESSIONS} sessions of this tenant are open, which is the most; close "
                f"some, or wait {self._idle_s:g} s for silent ones to end",
                "too_many_sessions",
                self._idle_s,
            )
        session = Session(str(uuid.uuid4()), tenant, access, metadata)
        self._sessions[session.id] = session
        if self._watching is None:
            self._watching = asyncio.create_task(self._watch())
        return session

    def of_tenant(self, tenant: str) -> list[Session]:
        return [each for each in self._sessions.values() if each.tenant == tenant]

    def find(self, session_id: str, tenant: str) -> Session:
        """Raises ApiError (404) for unknown sessions, ended ones and those of others."""
        session = self._sessions.get(session_id)
        if session is None or session.tenant != tenant:
            raise not_found(
                f"there is no session {session_id[:80]!r}: it has ended, or was silent for "
                f"{self._idle_s:g} s",
                "session_id",
                "unknown_session",
            )
        session.used = time.monotonic()
        return session

    def find_run(self, run_id: str, tenant: str) -> TrainingRun:
        """Raises ApiError (404)."""
        run = self.find(run_id.partition(":")[0], tenant).runs.get(run_id)
        if run is None:
            raise not_found(f"there is no training client {run_id[:120]!r}", "model_id", "no_model")
        return run

    def add_run(self, session: Session, run: Run) -> TrainingRun:
        """Take a place for a run. Raises ApiError (403) if there is none."""
        n_all = sum(len(each.runs) for each in self._sessions.values())
        n_ours = sum(len(each.runs) for each in self.of_tenant(session.tenant))
        most = session.access.max_jobs or (_MAX_OF_TENANT if session.access.tenant else n_all + 1)
        if n_ours >= most or n_all >= self._max_runs:
            limit = f"{most} of this tenant" if n_ours >= most else f"{self._max_runs} of all"
            raise ApiError(
                403,
                f"{n_all if n_ours < most else n_ours} training clients are open, and {limit} may "
                "be; close a session, or raise --max-training-clients or the key's max_jobs",
                code="too_many_training_clients",
            )
        session.runs[run.id] = added = TrainingRun(run, session)
        return added

    async def end(self, session: Session) -> None:
        """End a session: running calls are cancelled and adapters forgotten."""
        if self._sessions.pop(session.id, None) is None:
            return
        session.close()
        for name, clean in session.cleanups.items():
            try:
                await clean()
            except ApiError as error:
                _log.warning("a session ended and left the adapter %s: %s", name, error)

    async def close(self) -> None:
        if self._watching is not None:
            self._watching.cancel()
        for session in list(self._sessions.values()):
            await self.end(session)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self._idle_s / 4))
            for session in list(self._sessions.values()):
                if session.is_busy:
                    session.used = time.monotonic()
                if time.monotonic() - session.used > self._idle_s:
                    _log.info("session %s was silent for %g s and ends", session.id, self._idle_s)
                    await self.end(session)


def _retrieve(task: asyncio.Task[object]) -> None:
    """Mark the error as seen, for clients that never fetch it."""
    if not task.cancelled():
        task.exception()
