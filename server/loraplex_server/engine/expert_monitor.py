"""How routed adapters use their experts, for /metrics and the routing report."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import NamedTuple

import torch

from loraplex_router.experts import ExpertLoad, LoadHistory, PlacedExperts

from .copy_back import CopyBack
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
        self._reading: _Reading | None = None

    def look(self, residents: Iterable[ResidentAdapter], *, idle: bool) -> None:
        """Engine thread, after each step. Reads the device's counters once a second, and whenever
        the engine falls idle, so that the last rows are not missed. Waits for the device then
        alone: elsewhere a later look finds what an earlier one has asked for.
        """
        self._take(waits=idle)
        now = time.monotonic()
        if self._reading is not None or (now - self._looked_at < _LOOK_EVERY_S and not idle):
            return
        self._looked_at = now
        routed = [one for one in residents if one.experts]
        if routed:
            loads = [placed.load for one in routed for placed in one.experts.values()]
            sizes = [_sizes(one.experts) for one in routed]
            digests = [one.digest for one in routed]
            self._reading = _Reading(now, digests, sizes, CopyBack(torch.cat(loads)))
            self._take(waits=idle)

    def load(self, digest: str, window_s: float) -> ExpertLoad | None:
        """None if the adapter has not routed here lately. Any thread."""
        with self._lock:
            history = self._histories.get(digest)
            return None if history is None else history.over(time.monotonic(), window_s)

    def digests(self) -> tuple[str, ...]:
        """Of the adapters that are remembered, the last used first. Any thread."""
        with self._lock:
            return tuple(reversed(self._histories))

    def _take(self, *, waits: bool) -> None:
        """Records what was read, if it is here."""
        reading = self._reading
        if reading is None:
            return
        found = reading.copy.wait() if waits else reading.copy.found()
        if found is None:
            return
        self._reading = None
        counts = iter(found.tolist())
        with self._lock:
            for digest, sizes in zip(reading.digests, reading.sizes, strict=True):
                totals = {place: tuple(islice(counts, n)) for place, n in sizes.items()}
                self._record(digest, reading.at, totals)

    def _record(self, digest: str, now: float, totals: dict[str, tuple[int, ...]]) -> None:
        self._histories.setdefault(digest, LoadHistory()).record(now, totals)
        self._histories.move_to_end(digest)
        if len(self._histories) > _MAX_ADAPTERS:
            self._histories.popitem(last=False)


class _Reading(NamedTuple):
    """Counters of all routed adapters, on their way from the device."""

    at: float  # time.monotonic()
    digests: list[str]
    sizes: list[dict[str, int]]  # of each adapter by place: its experts
    copy: CopyBack


def _sizes(experts: Mapping[str, PlacedExperts]) -> dict[str, int]:
    return {place: placed.load.shape[0] for place, placed in experts.items()}
