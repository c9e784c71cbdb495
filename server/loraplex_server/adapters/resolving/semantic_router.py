"""Chooses adapters for ``auto`` on a thread of its own, many texts of a tenant at a time.

The thread owns the index; the encoder has another thread, on which all tenants' texts go in pieces.
Requests of a tenant that arrive while it works are answered together in the tenant's next turn.
``AutoRouter`` caches the vectors of texts.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, TypeVar

from torch import Tensor

from loraplex_adapter_store.store import AdapterStore
from loraplex_router.adapters.auto_router import (
    MAX_QUERY_CHARS,
    AdapterFilter,
    AdapterProfile,
    AutoRouter,
    Decision,
)
from loraplex_router.adapters.classifier import Calibration
from loraplex_router.adapters.encoder import Encoder
from loraplex_server.errors import too_many
from loraplex_server.tenant_shares import TenantThreads

from .sentence_encoder import pieces

_MAX_BATCH = 32
_MAX_WAITING = 512  # texts of a tenant
_PIECE_CHARS = 1024  # that are encoded at once, with padding
_LISTING_AGE_S = 1.0  # how long a listing of the adapters is reused
_T = TypeVar("_T")


class _Question(NamedTuple):
    text: str  # cut to the length that decides
    allowed: AdapterFilter | None  # the adapters that the key may use
    with_tools: bool


@dataclass(slots=True)
class RoutingStats:
    """Counts since the start."""

    n_chosen: int = 0  # texts for which an adapter was chosen
    n_base: int = 0  # texts for which the base was chosen
    seconds: float = 0.0  # time spent on decisions, without waiting


class _Pending(NamedTuple):
    question: _Question
    answer: asyncio.Future[Decision]
    relist: bool


class SemanticRouter:
    """Chooses adapters for ``auto``. Event loop only."""

    def __init__(
        self,
        encoder: Encoder,
        list_profiles: Callable[[], Sequence[AdapterProfile]],
        routing: TenantThreads,
        encoding: TenantThreads,
    ) -> None:
        """``routing`` is one thread, which lists the adapters, again after a call that failed.

        ``encoding`` runs the encoder on a few texts at a time.
        """
        self._router, self._encoder = AutoRouter(encoder), encoder
        self._list_profiles = list_profiles
        self._routing, self._encoding = routing, encoding
        self._pending: dict[str, list[_Pending]] = {}  # by tenant
        self._tasks: set[asyncio.Task[None]] = set()  # one for each tenant in ``_pending``
        self._listed_at = float("-inf")
        self.stats = RoutingStats()

    async def choose(
        self,
        text: str,
        allowed: AdapterFilter | None = None,
        *,
        tenant: str | None = None,
        with_tools: bool = False,
        relist: bool = False,
    ) -> Decision:
        """Return the decision among the ``allowed`` adapters.

        ``with_tools``: the request offers tools. ``relist``: list the adapters again first.
        Raises the errors of the encoder and of the listing, and ApiError (429) if too many texts
        of the tenant wait.
        """
        question = _Question(text[:MAX_QUERY_CHARS], allowed, with_tools)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Decision] = loop.create_future()
        tenant = tenant or ""
        if tenant not in self._pending:
            self._pending[tenant] = []
            task = loop.create_task(self._answer_all(tenant))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if len(self._pending[tenant]) >= _MAX_WAITING:
            raise too_many(
                f"{_MAX_WAITING} requests of this tenant wait for the choice of an adapter; send "
                "fewer at once, or name the adapter",
                "queue_full",
                1.0,
            )
        self._pending[tenant].append(_Pending(question, answer, relist))
        return await answer

    @property
    def calibration(self) -> Calibration | None:
        """Return the calibration of the last fit; None before the first one."""
        return self._router.calibration

    async def _answer_all(self, tenant: str) -> None:
        """Answer the tenant's questions until none is left."""
        pending = self._pending[tenant]
        try:
            while pending:
                batch = pending[:_MAX_BATCH]
                del pending[: len(batch)]
                await self._answer(tenant, batch)
        finally:
            del self._pending[tenant]
            for each in pending:  # the event loop ends
                each.answer.cancel()

    async def _answer(self, tenant: str, batch: Sequence[_Pending]) -> None:
        questions = list(dict.fromkeys(each.question for each in batch))
        relist = any(each.relist for each in batch)
        try:
            list_unread = partial(self._unread, questions, relist)
            unread = await self._timed(self._routing, tenant, list_unread)
            vectors: dict[str, Tensor] = {}
            for piece in pieces([len(text) for text in unread], _PIECE_CHARS):
                texts = [unread[index] for index in piece]
                encode = partial(self._encoder.encode, texts)
                encoded = await self._timed(self._encoding, tenant, encode)
                vectors |= zip(texts, encoded, strict=True)
            decide = partial(self._decide, questions, vectors)
            decisions = await self._timed(self._routing, tenant, decide)
        except BaseException as error:
            for each in batch:
                if isinstance(error, asyncio.CancelledError):
                    each.answer.cancel()
                elif not each.answer.done():  # the client is still there
                    each.answer.set_exception(error)
            if not isinstance(error, Exception):
                raise
            return
        for each in batch:
            decision = decisions[each.question]
            if decision.adapter is None:
                self.stats.n_base += 1
            else:
                self.stats.n_chosen += 1
            if not each.answer.done():
                each.answer.set_result(decision)

    async def _timed(self, threads: TenantThreads, tenant: str, work: Callable[[], _T]) -> _T:
        def timed() -> _T:
            started = time.perf_counter()
            try:
                return work()
            finally:
                self.stats.seconds += time.perf_counter() - started

        return await threads.run(tenant, timed)

    def _unread(self, questions: Sequence[_Question], relist: bool) -> list[str]:
        """Bring the list of adapters up to date. Return the texts to encode before deciding."""
        now = time.monotonic()
        if relist or now - self._listed_at > _LISTING_AGE_S:
            self._router.update(self._list_profiles())
            self._listed_at = now
        unread: dict[str, None] = {}
        for (allowed, with_tools), texts in _alike(questions).items():
            unread |= dict.fromkeys(self._router.unread(texts, allowed, with_tools=with_tools))
        return list(unread)

    def _decide(
        self, questions: Sequence[_Question], vectors: Mapping[str, Tensor]
    ) -> dict[_Question, Decision]:
        self._router.remember(vectors)
        decisions: dict[_Question, Decision] = {}
        for (allowed, with_tools), texts in _alike(questions).items():
            routed = self._router.route(texts, allowed, with_tools=with_tools)
            for text, decision in zip(texts, routed, strict=True):
                decisions[_Question(text, allowed, with_tools)] = decision
        return decisions


def _alike(
    questions: Sequence[_Question],
) -> dict[tuple[AdapterFilter | None, bool], list[str]]:
    """Group the texts by what one index answers."""
    groups: dict[tuple[AdapterFilter | None, bool], list[str]] = {}
    for text, allowed, with_tools in questions:
        groups.setdefault((allowed, with_tools), []).append(text)
    return groups


def routable_profiles(store: AdapterStore) -> list[AdapterProfile]:
    """Return the adapters that ``auto`` may choose: servable, generating, and not opted out."""
    return [
        AdapterProfile(
            card.name,
            card.description,
            card.examples,
            for_tools=card.defaults.get("auto") == "with_tools",
        )
        for card in store.list()
        if card.unservable is None and card.task is None and card.defaults.get("auto") != "never"
    ]
