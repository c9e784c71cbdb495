"""Responses that are kept, in memory, for whoever made them.

Bounded in bytes and time. When it is full the tenant that holds most loses its oldest: nobody
pushes out what belongs to others who keep less.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

__all__ = ["KeptResponse", "ResponseStore"]

_OVERHEAD = 1024  # bytes of an entry beside its content


class KeptResponse(NamedTuple):
    body: bytes  # the answer
    conversation: bytes  # a JSON list of chat messages: all before it, and its own

    @property
    def n_bytes(self) -> int:
        return len(self.body) + len(self.conversation) + _OVERHEAD


class _Entry(NamedTuple):
    kept: KeptResponse
    expires: float


class ResponseStore:
    """Lives on one event loop."""

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

    def keep(self, tenant: str, id: str, kept: KeptResponse) -> None:
        """Not at all if it alone is larger than the store."""
        if kept.n_bytes > self.max_bytes:
            return
        self._drop_expired()
        while self.n_bytes + kept.n_bytes > self.max_bytes:
            self._drop_oldest(max(self._n_bytes, key=self._n_bytes.__getitem__))
        self._tenants.setdefault(tenant, OrderedDict())[id] = _Entry(
            kept, self._clock() + self._ttl_s
        )
        self._n_bytes[tenant] = self._n_bytes.get(tenant, 0) + kept.n_bytes

    def get(self, tenant: str, id: str) -> KeptResponse | None:
        entries = self._tenants.get(tenant)
        entry = None if entries is None else entries.get(id)
        return None if entry is None or entry.expires <= self._clock() else entry.kept

    def delete(self, tenant: str, id: str) -> bool:
        """Whether it was there."""
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
        self._n_bytes[tenant] -= entries.pop(id).kept.n_bytes
        if not entries:
            del self._tenants[tenant], self._n_bytes[tenant]
