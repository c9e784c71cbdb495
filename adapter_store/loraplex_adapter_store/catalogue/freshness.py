"""How old the catalogue's answers are, and whether they may still be used.

A name is asked for again when its last answer is ``refresh_s`` old. While the object store is down
the last answer counts for ``stale_s``; after that the name is unavailable, never guessed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

from loraplex_adapter_store.errors import CatalogueUnavailable, StoreError
from loraplex_adapter_store.faults import FaultLog
from loraplex_adapter_store.names import tenant_of

from .limits import CatalogueLimits

__all__ = ["Answer", "Freshness"]

_MAX_ANSWERS = 65_536  # names remembered, most of which may not exist
_TRY_AGAIN_S = 2.0  # after a failure, before the object store is asked once more by a reader


class Answer(NamedTuple):
    """What the catalogue said of a name, and when."""

    number: int  # of its state; 0: it never existed
    at: float  # monotonic, when it was asked


class Freshness:
    """Thread-safe. Owner of the last answer for each name, and of when the object store failed."""

    def __init__(self, limits: CatalogueLimits, faults: FaultLog) -> None:
        self._refresh_s, self._stale_s = limits.refresh_s, limits.stale_s
        self._faults = faults
        self._clock = time.monotonic
        self._lock = threading.Lock()
        self._answers: dict[str, Answer] = {}  # oldest first
        self._all_at = float("-inf")  # when everything was asked for
        self._down_until = float("-inf")

    def now(self) -> float:
        return self._clock()

    def answer(self, name: str) -> Answer | None:
        return self._answers.get(name)

    def is_fresh(self, name: str) -> bool:
        """Takes a microsecond."""
        answer = self._answers.get(name)
        return answer is not None and self._clock() - answer.at <= self._refresh_s

    def may_use(self, name: str) -> bool:
        """Whether the last answer counts because the object store is down."""
        now, answer = self._clock(), self._answers.get(name)
        return now < self._down_until and answer is not None and now - answer.at <= self._stale_s

    def all_fresh(self) -> bool:
        return self._clock() - self._all_at <= self._refresh_s

    def may_use_all(self) -> bool:
        now = self._clock()
        return now < self._down_until and now - self._all_at <= self._stale_s

    def answered(self, name: str, number: int, began: float) -> None:
        with self._lock:
            self._answers.pop(name, None)
            self._answers[name] = Answer(number, began)
            if len(self._answers) > _MAX_ANSWERS:
                absent = (each for each, answer in self._answers.items() if not answer.number)
                oldest = next(absent, None)
                if oldest is not None:
                    del self._answers[oldest]

    def numbers(self, tenant: str | None = None) -> dict[str, int]:
        """Of all names that were asked for, or those of a tenant."""
        with self._lock:
            known = {name: answer.number for name, answer in self._answers.items()}
        if tenant is None:
            return known
        return {name: number for name, number in known.items() if tenant_of(name) == tenant}

    def confirmed(self, numbers: Mapping[str, int], began: float) -> None:
        """A listing that began then still shows these numbers."""
        with self._lock:
            for name, number in numbers.items():
                answer = self._answers.get(name)
                if answer is not None and answer.number == number and answer.at < began:
                    self._answers[name] = Answer(number, began)

    def all_answered(self, began: float) -> None:
        self._all_at = began

    @contextmanager
    def outdated_by_failure(self, name: str) -> Iterator[None]:
        """After a change that failed, what is known of the name may be old."""
        try:
            yield
        except StoreError:
            with self._lock:
                answer = self._answers.get(name)
                if answer is not None:
                    outdated = self._clock() - self._refresh_s - 1.0
                    self._answers[name] = Answer(answer.number, min(answer.at, outdated))
            raise

    @contextmanager
    def asking(self, *, even_if_down: bool = False) -> Iterator[None]:
        """A use of the object store. Readers do not ask again right after it failed."""
        if not even_if_down and self._clock() < self._down_until:
            raise CatalogueUnavailable("the catalogue could not be reached a moment ago; try again")
        try:
            yield
        except CatalogueUnavailable as error:
            self._down_until = self._clock() + _TRY_AGAIN_S
            self._faults.failed("catalogue", error)
            raise
        self._down_until = float("-inf")
        self._faults.worked("catalogue")
