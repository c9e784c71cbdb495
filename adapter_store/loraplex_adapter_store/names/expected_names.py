"""Names that are about to be added, so that who asks for one waits instead of hearing a 404."""

import threading
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future


class ExpectedNames:
    """Owner of the order in which names are added: those that somebody waits for come first.

    Any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._arrivals: dict[str, Future[None]] = {}  # of the names that were not added yet
        self._queue: deque[str] = deque()  # a name that was asked for stands in it twice
        self._taken: set[str] = set()

    def __len__(self) -> int:
        return len(self._arrivals)

    def expect(self, names: Iterable[str]) -> None:
        with self._lock:
            new = [name for name in names if name not in self._arrivals]
            self._arrivals.update((name, Future()) for name in new)
            self._queue.extend(new)

    def arrivals(self, names: Iterable[str]) -> list[Future[None]]:
        """Return a future for each expected one of the names, and move them to the front.

        A future also completes if the name is refused or gone. Takes microseconds.
        """
        if not self._arrivals:
            return []
        with self._lock:
            wanted = [name for name in names if name in self._arrivals]
            self._queue.extendleft(wanted)
            return [self._arrivals[name] for name in wanted]

    def next(self) -> str | None:
        """Return the name that the caller is to add next, or None if none is left."""
        with self._lock:
            while self._queue:
                name = self._queue.popleft()
                if name in self._arrivals and name not in self._taken:
                    self._taken.add(name)
                    return name
        return None

    def arrived(self, name: str) -> None:
        """Wake those who wait for the name: it was added, refused or is gone."""
        with self._lock:
            self._taken.discard(name)
            future = self._arrivals.pop(name, None)
        if future is not None:
            future.set_result(None)
