"""The age of the catalogue's answers, and whether they may still be used.

A name is asked for again when its last answer is ``refresh_s`` old. While the object store is down
the last answer counts for ``stale_s``; after that the name is unavailable.
"""

import logging
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from loraplex_adapter_store.errors import CatalogueUnavailable, StoreError
from loraplex_adapter_store.names.name_syntax import tenant_of
from loraplex_adapter_store.part_log import worked

ALL_NAMES = ""  # in place of a name: the listing of all names
_MAX_ANSWERS = 65_536  # names remembered, most of which may not exist
_RETRY_S = 2.0  # after a failure, before a reader asks the object store again
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CatalogueLimits:
    refresh_s: float = 1.0  # age at which the answer for a name is asked for again
    stale_s: float = 300.0  # largest age of an answer while the object store is down
    poll_s: float = 10.0  # between two listings, for names that no request uses
    disk_bytes: int = 64 << 30  # contents on this server's disk


class Answer(NamedTuple):
    """The catalogue's last answer about a name."""

    number: int  # of the state; 0: the name never existed
    at: float  # monotonic, before the question


class Freshness:
    """Owner of the last answer for each name, and of the object store's failures. Thread-safe."""

    def __init__(self, limits: CatalogueLimits) -> None:
        self._refresh_s, self._stale_s = limits.refresh_s, limits.stale_s
        self._clock = time.monotonic
        self._lock = threading.Lock()
        self._answers: dict[str, Answer] = {}  # oldest first
        self._down_until = float("-inf")

    def now(self) -> float:
        return self._clock()

    def answer(self, name: str) -> Answer | None:
        return self._answers.get(name)

    def is_fresh(self, name: str) -> bool:
        """Return True if the last answer is recent enough. Takes a microsecond."""
        answer = self._answers.get(name)
        return answer is not None and self._clock() - answer.at <= self._refresh_s

    def is_usable(self, name: str) -> bool:
        """True if the answer is fresh, or may be used because the object store is down."""
        now, answer = self._clock(), self._answers.get(name)
        limit_s = self._refresh_s
        if now < self._down_until:
            limit_s = max(limit_s, self._stale_s)
        return answer is not None and now - answer.at <= limit_s

    def answered(self, name: str, number: int, began: float) -> None:
        """Record an answer to a question that began at ``began``."""
        with self._lock:
            self._answers.pop(name, None)
            self._answers[name] = Answer(number, began)
            if len(self._answers) > _MAX_ANSWERS:
                absent = (each for each, answer in self._answers.items() if not answer.number)
                oldest = next(absent, None)
                if oldest is not None:
                    del self._answers[oldest]

    def numbers(self, tenant: str | None = None) -> dict[str, int]:
        """Return the numbers of all remembered names, or of a tenant's."""
        with self._lock:
            known = {name: answer.number for name, answer in self._answers.items()}
        if tenant is None:
            return known
        return {name: number for name, number in known.items() if tenant_of(name) == tenant}

    def confirmed(self, numbers: Mapping[str, int], began: float) -> None:
        """Renew the answers that a listing has confirmed."""
        with self._lock:
            for name, number in numbers.items():
                answer = self._answers.get(name)
                if answer is not None and answer.number == number and answer.at < began:
                    self._answers[name] = Answer(number, began)

    @contextmanager
    def outdated_by_failure(self, name: str) -> Iterator[None]:
        """Outdate the answer for ``name`` if a change inside the block fails."""
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
        """Wrap a use of the object store. For a while after a failure, readers are refused."""
        if not even_if_down and self._clock() < self._down_until:
            raise CatalogueUnavailable("the catalogue could not be reached a moment ago; try again")
        try:
            yield
        except CatalogueUnavailable as error:
            self._down_until = self._clock() + _RETRY_S
            _log.error("the catalogue cannot be reached: %s", error, extra={"part": "catalogue"})
            raise
        self._down_until = float("-inf")
        worked("catalogue")
