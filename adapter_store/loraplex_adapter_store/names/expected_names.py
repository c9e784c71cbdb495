"""Adapter names that the server is still adding after its start.

A request for one of them waits instead of getting a 404.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future


class ExpectedNames:
    """Owner of the order in which names are added: those that somebody waits for come first.

    Any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrivals: dict[str, Future[None]] = {}  # of the names that were not added yet
        self._queue: OrderedDict[str, None] = OrderedDict()  # those that nobody adds yet

    def __len__(self) -> int:
        return len(self._arrivals)

    def expect(self, names: Iterable[str]) -> None:
        with self._lock:
            for name in names:
                if name not in self._arrivals:
                    self._arrivals[name] = Future()
                    self._queue[name] = None

    def arrivals(self, names: Iterable[str]) -> list[Future[None]]:
        """Return a future for each expected one of the names, and move them to the front.

        A future also completes if the name is refused or gone. Takes microseconds.
        """
        if not self._arrivals:
            return []
        with self._lock:
            wanted = [name for name in names if name in self._arrivals]
            for name in wanted:
                if name in self._queue:
                    self._queue.move_to_end(name, last=False)
            return [self._arrivals[name] for name in wanted]

    def next(self) -> str | None:
        """Return the name that the caller is to add next, or None if none is left."""
        with self._lock:
            return self._queue.popitem(last=False)[0] if self._queue else None

    def arrived(self, name: str) -> None:
        """Wake those who wait for the name: it was added, refused or is gone."""
        with self._lock:
            future = self._arrivals.pop(name, None)
            self._queue.pop(name, None)
        if future is not None:
            future.set_result(None)
