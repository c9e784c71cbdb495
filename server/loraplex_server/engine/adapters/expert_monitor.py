"""Counts how routed adapters use their experts, for /metrics and the routing report."""

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import NamedTuple

import torch

from loraplex_router.experts.expansion import PlacedExperts
from loraplex_router.experts.load import ExpertLoad, LoadHistory
from loraplex_server.engine.memory.copy_stream import CopyBack

from .resident_adapter import ResidentAdapter

_LOOK_EVERY_S = 1.0
_MAX_ADAPTERS = 64  # with a history; the least recently used loses its own


class ExpertMonitor:
    """Histories of expert loads. The engine thread records them; any thread reads them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards the histories, held for microseconds
        self._histories: OrderedDict[str, LoadHistory] = OrderedDict()
        self._looked_at = float("-inf")
        self._reading: _Reading | None = None

    def look(self, residents: Iterable[ResidentAdapter], *, idle: bool) -> None:
        """Reads the device's counters once a second, and when the engine becomes idle.

        Called after each step, on the engine thread. Waits for the device only when idle; otherwise
        a later call records the counters.
        """
        self._take(waits=idle)
        now = time.monotonic()
        if self._reading is not None or (now - self._looked_at < _LOOK_EVERY_S and not idle):
            return
        self._looked_at = now
        routed = [adapter for adapter in residents if adapter.experts]
        if routed:
            loads = [placed.load for adapter in routed for placed in adapter.experts.values()]
            sizes = {adapter.digest: _sizes(adapter.experts) for adapter in routed}
            self._reading = _Reading(now, sizes, CopyBack(torch.cat(loads)))
            self._take(waits=idle)

    def load(self, digest: str, window_s: float) -> ExpertLoad | None:
        """Return an adapter's load; None if it has no history. Any thread."""
        with self._lock:
            history = self._histories.get(digest)
            return None if history is None else history.over(time.monotonic(), window_s)

    def digests(self) -> tuple[str, ...]:
        """Return the adapters with a history, most recently used first. Any thread."""
        with self._lock:
            return tuple(reversed(self._histories))

    def _take(self, *, waits: bool) -> None:
        """Records the pending reading once it has arrived."""
        reading = self._reading
        if reading is None:
            return
        counters = reading.copy.wait() if waits else reading.copy.poll()
        if counters is None:
            return
        self._reading = None
        counts = iter(counters.tolist())
        with self._lock:
            for digest, sizes in reading.sizes.items():
                totals = {site: tuple(islice(counts, n)) for site, n in sizes.items()}
                self._record(digest, reading.at, totals)

    def _record(self, digest: str, now: float, totals: dict[str, tuple[int, ...]]) -> None:
        self._histories.setdefault(digest, LoadHistory()).record(now, totals)
        self._histories.move_to_end(digest)
        if len(self._histories) > _MAX_ADAPTERS:
            self._histories.popitem(last=False)


class _Reading(NamedTuple):
    """Counters of all routed adapters, being copied from the device."""

    at: float  # time.monotonic()
    sizes: dict[str, dict[str, int]]  # number of experts by digest and site
    copy: CopyBack


def _sizes(experts: Mapping[str, PlacedExperts]) -> dict[str, int]:
    return {site: placed.load.shape[0] for site, placed in experts.items()}
