"""What share of the time work in the background takes while requests are answered."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

__all__ = ["BackgroundShare"]

_LEAST_REST_S = 0.002  # shorter rests are saved up: a wait costs about as much as it gives
_LOOK_S = 0.05  # the longest wait before another look at whether anybody is served


class BackgroundShare:
    """Work that calls ``rest`` between pieces of some milliseconds takes ``share`` of the time.

    That goes while requests are served; else it goes on at once. One thread works at a time.
    A low priority alone does not do: the thread holds Python's lock and shares memory bandwidth
    whatever its priority, and one that the system hardly runs may hold that lock for long.
    """

    def __init__(self, share: float, is_serving: Callable[[], bool]) -> None:
        """``share``: above 0, at most 1."""
        self._rest_per_work = 1 / share - 1
        self._is_serving = is_serving
        self._deadline, self._stop = math.inf, threading.Event()
        self._since = self._owed = 0.0

    def start(self, deadline: float, stop: threading.Event) -> None:
        """Another piece of work. ``deadline``: of ``time.monotonic``; ``stop`` ends all rests."""
        self._deadline, self._stop = deadline, stop
        self._since, self._owed = time.monotonic(), 0.0

    def rest(self) -> None:
        """As long as the work since the last call makes necessary. On the working thread.

        Raises TimeoutError at the deadline.
        """
        now = time.monotonic()
        self._owed += (now - self._since) * self._rest_per_work
        while now < self._deadline and self._is_serving():
            if self._owed < _LEAST_REST_S or self._stop.wait(self._longest(now)):
                break
            rested_from, now = now, time.monotonic()
            self._owed -= now - rested_from
        else:
            self._owed = 0.0
        self._since = time.monotonic()
        if self._since >= self._deadline:
            raise TimeoutError

    def _longest(self, now: float) -> float:
        return min(self._owed, _LOOK_S, self._deadline - now)
