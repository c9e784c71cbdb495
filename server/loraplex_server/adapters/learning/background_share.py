"""Limits the share of the time that background work takes while requests are served."""

import threading
import time
from collections.abc import Callable

_LEAST_REST_S = 0.002  # shorter rests are added up, because a wait has a cost
_LOOK_S = 0.05  # longest wait before ``is_serving`` is called again


class BackgroundShare:
    """Pauses one thread so that its work takes ``share`` of the time.

    The thread calls ``rest`` between pieces of some milliseconds. While no request is served,
    ``rest`` returns at once. A low priority is not enough: the thread would still hold Python's
    lock and use memory bandwidth.
    """

    def __init__(self, share: float, is_serving: Callable[[], bool]) -> None:
        """``share``: above 0, at most 1."""
        self._rest_per_work = 1 / share - 1
        self._is_serving = is_serving
        self._stop = threading.Event()
        self._since = self._owed = 0.0

    def start(self, stop: threading.Event) -> None:
        """Begin a job. ``stop`` ends all pauses."""
        self._stop = stop
        self._since, self._owed = time.monotonic(), 0.0

    def rest(self) -> None:
        """Sleep in proportion to the work since the last call. Called on the working thread."""
        now = time.monotonic()
        self._owed += (now - self._since) * self._rest_per_work
        while self._is_serving():
            if self._owed < _LEAST_REST_S or self._stop.wait(min(self._owed, _LOOK_S)):
                break
            rested_from, now = now, time.monotonic()
            self._owed -= now - rested_from
        else:
            self._owed = 0.0
        self._since = time.monotonic()
