"""The limit of a server's connections, and the choice of the one that is closed for a new one.

busy     from the end of a request's head to the end of its answer
unread   busy, but the client without an API key does not read the answer
idle     otherwise: silent, in a head, between requests, or in a body that was answered already

``N_SPARE`` further connections may be open, so that a probe is answered when all others are busy.
When no more may be open, a new connection takes the place of another, in the order of ``Group``:
of the one whose last byte is the oldest.
"""

from collections import OrderedDict
from enum import IntEnum
from typing import Protocol

N_SPARE = 64


class Group(IntEnum):
    """A connection's place in the order in which connections are closed."""

    IDLE = 0
    UNREAD = 1
    IDLE_WITH_KEY = 2  # a request on it came with a valid API key
    BUSY = 3  # never closed, nor is the next
    BUSY_WITH_KEY = 4


class Connection(Protocol):
    def evict(self) -> None:
        """Close the connection without waiting for its client."""


class ConnectionLimit:
    """The open connections of a server by group. Event loop only."""

    def __init__(self, max_busy: int | None) -> None:
        """``max_busy`` None: no limit."""
        self._max_busy = max_busy
        # Each group begins with the connection that has been in it for the longest.
        self._groups = [OrderedDict[Connection, None]() for _ in Group]

    def make_room(self) -> bool:
        """Evict a connection if no more may be open. Return False if all are busy."""
        if self._max_busy is None or sum(map(len, self._groups)) < self._max_busy + N_SPARE:
            return True
        for group in self._groups[: Group.BUSY]:
            if group:
                connection, _ = group.popitem(last=False)
                connection.evict()
                return True
        return False

    def put(self, connection: Connection, group: Group) -> None:
        """Move the connection to the end of ``group``: its last byte is the newest."""
        self.remove(connection)
        self._groups[group][connection] = None

    def remove(self, connection: Connection) -> None:
        for group in self._groups:
            group.pop(connection, None)

    def is_exceeded(self, n_tasks: int, *, has_key: bool) -> bool:
        """Return True if too many connections are busy, or too many requests still run.

        ``n_tasks`` counts all running requests, also those whose clients have left. ``has_key``: an
        earlier request of the connection came with a key. Then only others with a key count.
        """
        if self._max_busy is None:
            return False
        n_with_key = len(self._groups[Group.BUSY_WITH_KEY])
        if has_key:
            return n_with_key > self._max_busy
        n_running = n_tasks - len(self._groups[Group.UNREAD])
        return max(len(self._groups[Group.BUSY]) + n_with_key, n_running) > self._max_busy
