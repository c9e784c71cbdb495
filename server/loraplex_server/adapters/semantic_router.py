"""Chooses adapters for texts on a thread of its own, many texts at a time.

The thread owns the index. Requests that arrive while it works are answered together in the
next round. Decisions are remembered until the adapters change.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from loraplex_router.adapters import (
    MAX_QUERY_CHARS,
    AdapterFilter,
    AdapterProfile,
    AutoRouter,
    Calibration,
    Decision,
    Encoder,
)

__all__ = ["RoutingStats", "SemanticRouter"]

_MAX_BATCH = 32
_LISTING_AGE_S = 1.0  # how long a listing of the adapters is reused
_N_REMEMBERED = 4096


class _Question(NamedTuple):
    text: str  # as much as decides: it is remembered
    allowed: AdapterFilter | None  # the adapters it may be given to
    with_tools: bool


@dataclass(frozen=True, slots=True)
class RoutingStats:
    """Since the start."""

    n_chosen: int = 0  # texts given to an adapter
    n_base: int = 0  # texts left to the base
    n_remembered: int = 0  # of both: answered from memory
    seconds: float = 0.0  # of work, without waiting


@dataclass(frozen=True, slots=True)
class _Pending:
    question: _Question
    loop: asyncio.AbstractEventLoop
    answer: asyncio.Future[Decision]
    relist: bool


class SemanticRouter:
    """``choose`` may be called on any event loop."""

    def __init__(
        self,
        encoder: Encoder,
        list_profiles: Callable[[], Sequence[AdapterProfile]],
    ) -> None:
        """Both are called on the router's thread; a question after one that failed asks again."""
        self._router = AutoRouter(encoder)
        self._list_profiles = list_profiles
        self._inbox: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._listed_at = float("-inf")
        self._remembered: OrderedDict[_Question, Decision] = OrderedDict()
        self._closed = False
        self.stats = RoutingStats()
        self._thread = threading.Thread(target=self._run, name="loraplex-router", daemon=True)
        self._thread.start()

    async def choose(
        self,
        text: str,
        allowed: AdapterFilter | None = None,
        *,
        with_tools: bool = False,
        relist: bool = False,
    ) -> Decision:
        """``allowed``: as if there were no others. ``with_tools``: the request offers tools.
        ``relist``: the adapters are listed for it, however young the last listing is.

        Raises what encoder and listing raise.
        """
        if self._closed:
            raise RuntimeError("the semantic router is closed")
        question = _Question(text[:MAX_QUERY_CHARS], allowed, with_tools)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Decision] = loop.create_future()
        self._inbox.put(_Pending(question, loop, answer, relist))
        return await answer

    @property
    def calibration(self) -> Calibration | None:
        """Of the last fit; None before the first."""
        return self._router.calibration

    def close(self) -> None:
        self._closed = True
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        import torch

        torch.set_num_threads(1)  # of this thread: the engine keeps the cores
        while (pending := self._take()) is not None:
            started = time.perf_counter()
            try:
                self._list(at_once=any(one.relist for one in pending))
                decisions = self._decide([one.question for one in pending])
            except Exception as error:
                for one in pending:
                    _tell(one, error)
                continue
            for one, decision in zip(pending, decisions, strict=True):
                _tell(one, decision)
            self._count(decisions, time.perf_counter() - started)

    def _take(self) -> list[_Pending] | None:
        """Everything that waits, at least one; None when the router is closed."""
        pending: list[_Pending] = []
        while len(pending) < _MAX_BATCH:
            try:
                one = self._inbox.get(block=not pending)
            except queue.Empty:
                break
            if one is None:
                for waiting in pending:
                    _tell(waiting, RuntimeError("the semantic router is closed"))
                return None
            pending.append(one)
        return pending

    def _list(self, *, at_once: bool) -> None:
        now = time.monotonic()
        if at_once or now - self._listed_at > _LISTING_AGE_S:
            if self._router.update(self._list_profiles()):
                self._remembered.clear()
            self._listed_at = now

    def _decide(self, questions: Sequence[_Question]) -> list[Decision]:
        new = dict.fromkeys(q for q in questions if q not in self._remembered)
        n_known = sum(q in self._remembered for q in questions)
        decided: dict[_Question, Decision] = {}
        for allowed, with_tools in dict.fromkeys((q.allowed, q.with_tools) for q in new):
            alike = [q for q in new if (q.allowed, q.with_tools) == (allowed, with_tools)]
            texts = [q.text for q in alike]
            routed = self._router.route(texts, allowed, with_tools=with_tools)
            decided.update(zip(alike, routed, strict=True))
        answers = [decided.get(q) or self._remembered[q] for q in questions]
        self._remembered.update(decided)
        while len(self._remembered) > _N_REMEMBERED:
            self._remembered.popitem(last=False)
        self.stats = RoutingStats(
            self.stats.n_chosen,
            self.stats.n_base,
            self.stats.n_remembered + n_known,
            self.stats.seconds,
        )
        return answers

    def _count(self, decisions: Sequence[Decision], seconds: float) -> None:
        n_chosen = sum(decision.adapter is not None for decision in decisions)
        old = self.stats
        self.stats = RoutingStats(
            old.n_chosen + n_chosen,
            old.n_base + len(decisions) - n_chosen,
            old.n_remembered,
            old.seconds + seconds,
        )


def _tell(pending: _Pending, result: Decision | Exception) -> None:
    def settle() -> None:
        if pending.answer.done():  # the client left
            return
        if isinstance(result, Exception):
            pending.answer.set_exception(result)
        else:
            pending.answer.set_result(result)

    try:
        pending.loop.call_soon_threadsafe(settle)
    except RuntimeError:  # the loop is closed: nobody listens
        return
