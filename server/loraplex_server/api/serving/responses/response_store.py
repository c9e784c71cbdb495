"""Stores responses in memory, for the tenant that made them.

The store is bounded in bytes and time. When it is full, the tenant that holds most loses its oldest
response.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

_OVERHEAD = 1024  # bytes of an entry without its content


class StoredResponse(NamedTuple):
    """A response and the conversation up to it."""

    body: bytes  # the answer
    conversation: bytes  # JSON list of chat messages, those of the answer included

    @property
    def n_bytes(self) -> int:
        return len(self.body) + len(self.conversation) + _OVERHEAD


class _Entry(NamedTuple):
    response: StoredResponse
    expires: float


class ResponseStore:
    """The stored responses of all tenants, on one event loop."""

    def __init__(
        self, max_bytes: int, ttl_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.max_bytes = max_bytes
        self._ttl_s = ttl_s
        self._clock = clock
        self._tenants: dict[str, OrderedDict[str, _Entry]] = {}  # oldest first
        self._n_bytes: dict[str, int] = {}

    @property
    def n_bytes(self) -> int:
        return sum(self._n_bytes.values())

    def store(self, tenant: str, id: str, response: StoredResponse) -> None:
        """Store the response, unless it alone is larger than the store."""
        if response.n_bytes > self.max_bytes:
            return
        self._drop_expired()
        while self.n_bytes + response.n_bytes > self.max_bytes:
            self._drop_oldest(max(self._n_bytes, key=self._n_bytes.__getitem__))
        self._tenants.setdefault(tenant, OrderedDict())[id] = _Entry(
            response, self._clock() + self._ttl_s
        )
        self._n_bytes[tenant] = self._n_bytes.get(tenant, 0) + response.n_bytes

    def get(self, tenant: str, id: str) -> StoredResponse | None:
        entries = self._tenants.get(tenant)
        entry = None if entries is None else entries.get(id)
        return None if entry is None or entry.expires <= self._clock() else entry.response

    def delete(self, tenant: str, id: str) -> bool:
        """Return True if the response was stored."""
        if self.get(tenant, id) is None:
            return False
        self._drop(tenant, id)
        return True

    def _drop_expired(self) -> None:
        now = self._clock()
        for tenant in list(self._tenants):
            while (entries := self._tenants.get(tenant)) and next(
                iter(entries.values())
            ).expires <= now:
                self._drop_oldest(tenant)

    def _drop_oldest(self, tenant: str) -> None:
        self._drop(tenant, next(iter(self._tenants[tenant])))

    def _drop(self, tenant: str, id: str) -> None:
        entries = self._tenants[tenant]
        self._n_bytes[tenant] -= entries.pop(id).response.n_bytes
        if not entries:
            del self._tenants[tenant], self._n_bytes[tenant]
