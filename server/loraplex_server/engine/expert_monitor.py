"""How routed adapters use their experts, for /metrics and the routing report."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from itertools import islice

import torch

from loraplex_router.experts import ExpertLoad, LoadHistory, PlacedExperts

from .resident_adapter import ResidentAdapter

__all__ = ["ExpertMonitor"]

_LOOK_EVERY_S = 1.0
_MAX_ADAPTERS = 64  # remembered; the least recently used is forgotten


class ExpertMonitor:
    """The engine thread records; any thread reads, at most a second late."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the histories, held for microseconds
        self._histories: OrderedDict[str, LoadHistory] = OrderedDict()
        self._looked_at = float("-inf")

    def look(self, residents: Iterable[ResidentAdapter], *, idle: bool) -> None:
        """Engine thread, after each step. Reads the device's counters once a second, and whenever
        the engine falls idle, so that the last rows are not missed.
        """
        now = time.monotonic()
        if now - self._looked_at < _LOOK_EVERY_S and not idle:
            return
        self._looked_at = now
        for resident in residents:
            if resident.experts:
                totals = _totals(resident.experts)
                with self._lock:
                    self._record(resident.digest, now, totals)

    def load(self, digest: str, window_s: float) -> ExpertLoad | None:
        """None if the adapter has not routed here lately. Any thread."""
        with self._lock:
            history = self._histories.get(digest)
            return None if history is None else history.over(time.monotonic(), window_s)

    def digests(self) -> tuple[str, ...]:
        """Of the adapters that are remembered, the last used first. Any thread."""
        with self._lock:
            return tuple(reversed(self._histories))

    def _record(self, digest: str, now: float, totals: dict[str, tuple[int, ...]]) -> None:
        self._histories.setdefault(digest, LoadHistory()).record(now, totals)
        self._histories.move_to_end(digest)
        if len(self._histories) > _MAX_ADAPTERS:
            self._histories.popitem(last=False)


def _totals(experts: Mapping[str, PlacedExperts]) -> dict[str, tuple[int, ...]]:
    """Of each place, in one copy from the device."""
    counts = iter(torch.cat([placed.load for placed in experts.values()]).tolist())
    return {place: tuple(islice(counts, placed.load.shape[0])) for place, placed in experts.items()}
