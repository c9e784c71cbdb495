"""Counts requests and tokens of each adapter since the start.

``AdapterUsage`` is for /metrics, with a bounded number of series, each of which only grows: a busy
adapter has a series of its own, and all others count as ``other``. ``AdapterActivities`` is for the
console and the API, and counts every adapter.
"""

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from time import perf_counter

OTHER = "other"
_DECAY = 0.5  # factor of the scores at each review
_LEAD = 1.5  # factor by which an adapter must beat the weakest shown one
_MAX_SCORES = 10_000
_WINDOW_S = 10  # window of the token rate
_MAX_NAMES = 10_000  # the least recently used adapters are forgotten


@dataclass(slots=True)
class AdapterCounters:
    name: str
    n_requests: int = 0
    n_prompt_tokens: int = 0
    n_output_tokens: int = 0
    queue_s: float = 0.0
    n_queued: int = 0
    load_s: float = 0.0  # seconds spent waiting for the lease
    ttft_s: float = 0.0
    n_first_tokens: int = 0
    n_prefix_hits: int = 0  # prompt tokens found in the prefix cache


class AdapterUsage:
    def __init__(self, n_shown: int) -> None:
        self._n_shown = n_shown
        self._shown: dict[str, AdapterCounters] = {}
        self._other = AdapterCounters(OTHER)
        self._scores: dict[str, float] = {}

    def counters(self, name: str) -> AdapterCounters:
        """Return the counters of ``name``, which a request keeps to its end."""
        if name in self._scores or len(self._scores) < _MAX_SCORES:
            self._scores[name] = self._scores.get(name, 0.0) + 1.0
        shown = self._shown.get(name)
        if shown is None and len(self._shown) < self._n_shown:
            shown = self._shown[name] = AdapterCounters(name)
        return shown or self._other

    def review(self) -> None:
        """Give the series of idle adapters to busy ones. Call this every few seconds."""
        hidden = sorted(
            (name for name in self._scores if name not in self._shown),
            key=self._scores.__getitem__,
            reverse=True,
        )
        for name in hidden:
            weakest = min(self._shown, key=lambda shown: self._scores.get(shown, 0.0))
            if self._scores[name] < _LEAD * self._scores.get(weakest, 0.0) + 1.0:
                break
            del self._shown[weakest]
            self._shown[name] = AdapterCounters(name)
        decayed = {name: score * _DECAY for name, score in self._scores.items()}
        self._scores = {name: score for name, score in decayed.items() if score > 0.01}

    def all(self) -> Iterable[AdapterCounters]:
        yield from self._shown.values()
        yield self._other


class AdapterActivity:
    """The counts of one adapter. Event loop only."""

    __slots__ = ("_by_second", "_second", "n_output_tokens", "n_requests")

    def __init__(self) -> None:
        self.n_requests = 0
        self.n_output_tokens = 0
        self._second = 0  # perf_counter value of the newest slot
        self._by_second = [0] * _WINDOW_S  # one slot for each of the last seconds

    def add_tokens(self, n_tokens: int, now: float) -> None:
        """Count tokens of an answer, as they are sent. ``now`` is a perf_counter value."""
        second = int(now)
        if second != self._second:
            self._forget_until(second)
        self._by_second[second % _WINDOW_S] += n_tokens
        self.n_output_tokens += n_tokens

    def to_json(self) -> dict[str, object]:
        self._forget_until(int(perf_counter()))
        return {
            "requests": self.n_requests,
            "output_tokens": self.n_output_tokens,
            "tokens_per_s": sum(self._by_second) / _WINDOW_S,
        }

    def _forget_until(self, second: int) -> None:
        """Empty the slots of the seconds since the newest one."""
        for passed in range(max(self._second, second - _WINDOW_S) + 1, second + 1):
            self._by_second[passed % _WINDOW_S] = 0
        self._second = max(self._second, second)


class AdapterActivities:
    """The counts of all adapters. Event loop only."""

    def __init__(self) -> None:
        self._by_name: OrderedDict[str, AdapterActivity] = OrderedDict()

    def used(self, name: str) -> AdapterActivity:
        """Return the counts of ``name``, which a request keeps to its end."""
        activity = self._by_name.setdefault(name, AdapterActivity())
        self._by_name.move_to_end(name)
        if len(self._by_name) > _MAX_NAMES:
            self._by_name.popitem(last=False)
        return activity

    def of(self, name: str) -> dict[str, object]:
        return (self._by_name.get(name) or AdapterActivity()).to_json()
