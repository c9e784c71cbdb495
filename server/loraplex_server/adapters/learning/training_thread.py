"""The thread that trains: calls of all jobs, merged into batches, beside serving."""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from loraplex_server.errors import invalid
from loraplex_training.engine.adapter import Adam, LearningAdapter, LoraShape
from loraplex_training.engine.engine import BATCH_TOKENS, Outcome, TrainingEngine, Work, batches
from loraplex_training.errors import TrainingError

from .background_share import BackgroundShare
from .low_priority import yield_to_serving

_T = TypeVar("_T")
_SPEED_LASTS_S = 60.0
_IDLE_S = 5.0  # without calls, after which cached weights are released


class Speed(NamedTuple):
    tokens_per_s: float
    at: float  # time.monotonic()


@dataclass(slots=True, eq=False)
class _Call:
    """A piece of work on the thread. ``work`` runs beside others, ``alone`` does not."""

    future: Future[Any]
    work: Work | None = None
    backward: bool = True
    alone: Callable[[TrainingEngine], Any] | None = None

    @property
    def n_tokens(self) -> int:
        return 1 if self.work is None else max(1, sum(map(len, self.work.data)))


@dataclass(slots=True)
class _Tenant:
    """The waiting calls of a tenant, in order for each adapter, and the tokens it has had."""

    queues: dict[Hashable, deque[_Call]] = field(default_factory=dict)
    n_tokens: int = 0


class TrainingThread:
    """Owns the training engine. Its methods are called on the event loop.

    Calls for one adapter run in their order. Calls for several adapters share a batch, and the
    tenant that has had the fewest tokens goes first.
    """

    def __init__(
        self,
        make_engine: Callable[[Callable[[], None]], TrainingEngine],
        share: BackgroundShare,
        n_threads: int,
    ) -> None:
        """``make_engine`` is called on the thread before its first call.

        Its argument is to be called every few milliseconds of work.
        """
        self._make_engine, self._share, self._n_threads = make_engine, share, n_threads
        self._tenants: dict[str, _Tenant] = {}
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._has_engine = False
        self.n_batches = self.n_shared = 0  # shared: batches of several adapters
        self.speed: Speed | None = None  # of the last batches with a backward

    @property
    def tokens_per_s(self) -> float | None:
        """The speed of the last minute's batches; None without any.

        An older speed, perhaps from beside many requests, would refuse jobs for good.
        """
        if self.speed is None or time.monotonic() - self.speed.at > _SPEED_LASTS_S:
            return None
        return self.speed.tokens_per_s

    async def check_base(self, tenant: str) -> None:
        """Make the engine if there is none. Raises ApiError (400) if it cannot train the base."""
        if not self._has_engine:
            try:
                await self.run(tenant, lambda engine: None)
            except TrainingError as error:
                raise invalid(str(error), None, "base_not_trainable") from error

    async def new_adapter(self, shape: LoraShape, seed: int) -> LearningAdapter:
        return await self.run("", lambda engine: engine.new_adapter(shape, seed))

    async def forward_backward(self, tenant: str, work: Work, *, backward: bool = True) -> Outcome:
        """Return the losses of a work, and with ``backward`` add to its adapter's gradient.

        The data of a large work are computed in pieces, between which others have their turn.
        """
        calls = [_Call(Future(), piece, backward) for piece in _pieces(work)]
        outcome = Outcome()
        for part in await self._done(tenant, id(work.adapter), calls):
            outcome.loss += part.loss
            outcome.n_tokens += part.n_tokens
            outcome.logprobs += part.logprobs
            outcome.right += part.right
            outcome.n_right += part.n_right
        return outcome

    async def step(self, tenant: str, adapter: LearningAdapter, adam: Adam) -> float:
        """Do a step of Adam and return the gradient's norm. Raises TrainingError."""
        call = _Call(Future(), alone=lambda engine: engine.step(adapter, adam))
        (norm,) = await self._done(tenant, id(adapter), [call])
        return float(norm)

    async def run(
        self,
        tenant: str,
        call: Callable[[TrainingEngine], _T],
        adapter: LearningAdapter | None = None,
    ) -> _T:
        """Return the result of ``call`` on the thread, after earlier calls for ``adapter``."""
        key: Hashable = object() if adapter is None else id(adapter)
        (result,) = await self._done(tenant, key, [_Call(Future(), alone=call)])
        value: _T = result
        return value

    def close(self) -> None:
        """Stop within some milliseconds. Waiting calls are cancelled."""
        with self._changed:
            self._closed.set()
            for tenant in self._tenants.values():
                for queue in tenant.queues.values():
                    for call in queue:
                        call.future.cancel()
            self._tenants.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    async def _done(self, tenant: str, key: Hashable, calls: Sequence[_Call]) -> list[Any]:
        with self._changed:
            if self._closed.is_set():
                raise asyncio.CancelledError
            queues = self._tenants.setdefault(tenant, _Tenant(n_tokens=self._least())).queues
            queues.setdefault(key, deque()).extend(calls)
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="loraplex-training")
                self._thread.start()
            self._changed.notify_all()
        return await asyncio.gather(*(asyncio.wrap_future(call.future) for call in calls))

    def _least(self) -> int:
        """Return the tokens of the tenant that has had the fewest, which a newcomer starts with."""
        return min((tenant.n_tokens for tenant in self._tenants.values()), default=0)

    def _loop(self) -> None:
        yield_to_serving(self._n_threads)
        engine: TrainingEngine | None = None
        while calls := self._next(engine):
            try:
                if engine is None:
                    engine = self._make_engine(self._rest)
                    self._has_engine = True
                self._share.start(self._closed)
                self._compute(engine, calls)
            except BaseException as error:  # the callers raise it
                for call in calls:
                    if not call.future.done():
                        call.future.set_exception(error)
            del calls

    def _rest(self) -> None:
        """Wait in proportion to the work since the last call. Raises once the thread is closed."""
        if self._closed.is_set():
            raise CancelledError
        self._share.rest()

    def _compute(self, engine: TrainingEngine, calls: Sequence[_Call]) -> None:
        if calls[0].alone is not None:
            calls[0].future.set_result(calls[0].alone(engine))
            return
        works = [call.work for call in calls if call.work is not None]
        began = time.monotonic()
        try:
            outcomes = engine.forward_backward(works, backward=calls[0].backward)
        except Exception:
            if len(calls) == 1:
                raise
            for call in calls:  # one of them has an error of its own
                try:
                    self._compute(engine, [call])
                except Exception as error:
                    call.future.set_exception(error)
            return
        self.n_batches += 1
        self.n_shared += len(works) > 1
        if calls[0].backward:
            rate = sum(call.n_tokens for call in calls) / (time.monotonic() - began)
            before = self.tokens_per_s
            rate = rate if before is None else before + (rate - before) / 4
            self.speed = Speed(rate, time.monotonic())
        for call, outcome in zip(calls, outcomes, strict=True):
            call.future.set_result(outcome)

    def _next(self, engine: TrainingEngine | None) -> list[_Call]:
        """Wait for calls and return those of the next batch; none once the thread is closed.

        ``engine`` releases memory after some seconds without a call.
        """
        with self._changed:
            while True:
                if self._closed.is_set():
                    return []
                if calls := self._taken():
                    return calls
                if not self._changed.wait(_IDLE_S if engine else None) and engine:
                    engine.release()
                    engine = None

    def _taken(self) -> list[_Call]:
        taken: list[_Call] = []
        room = BATCH_TOKENS
        for name in sorted(self._tenants, key=lambda name: self._tenants[name].n_tokens):
            tenant = self._tenants[name]
            for key, queue in list(tenant.queues.items()):
                while queue:
                    first = queue[0]
                    if taken and (first.alone or first.backward != taken[0].backward):
                        break
                    if taken and first.n_tokens > room:
                        break
                    queue.popleft()
                    if not first.future.set_running_or_notify_cancel():
                        continue  # the one behind it has its turn
                    taken.append(first)
                    room -= first.n_tokens
                    tenant.n_tokens += first.n_tokens
                    if first.alone:
                        return taken
                    break
                if not queue:
                    del tenant.queues[key]
            if not tenant.queues:
                del self._tenants[name]
        return taken


def _pieces(work: Work) -> list[Work]:
    """Return the work in pieces of at most a batch's tokens."""
    return [work._replace(data=data) for ((_, data),) in batches([work])]
