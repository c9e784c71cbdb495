"""What each adapter has done since the start, by name, for people to look at.

/metrics shows the busiest few as series (`adapter_usage`); here is every one, without series.
"""

from __future__ import annotations

from collections import OrderedDict
from time import perf_counter

__all__ = ["AdapterActivities", "AdapterActivity"]

_WINDOW_S = 10  # over which tokens a second are counted
_MAX_NAMES = 10_000  # the one that was used longest ago is forgotten


class AdapterActivity:
    """Event loop only."""

    __slots__ = ("_by_second", "_second", "n_output_tokens", "n_requests")

    def __init__(self) -> None:
        self.n_requests = 0
        self.n_output_tokens = 0
        self._second = 0  # of perf_counter, up to which the slots are right
        self._by_second = [0] * _WINDOW_S  # a slot for each of the last seconds

    def add_tokens(self, n_tokens: int, now: float) -> None:
        """``now``: of ``perf_counter``. Called for every token of an answer."""
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
        """Empties the slots of the seconds since the last one."""
        for passed in range(max(self._second, second - _WINDOW_S) + 1, second + 1):
            self._by_second[passed % _WINDOW_S] = 0
        self._second = max(self._second, second)


class AdapterActivities:
    """Event loop only."""

    def __init__(self) -> None:
        self._by_name: OrderedDict[str, AdapterActivity] = OrderedDict()

    def used(self, name: str) -> AdapterActivity:
        """Where a request for ``name`` counts; keep it for the whole request."""
        found = self._by_name.setdefault(name, AdapterActivity())
        self._by_name.move_to_end(name)
        if len(self._by_name) > _MAX_NAMES:
            self._by_name.popitem(last=False)
        return found

    def of(self, name: str) -> dict[str, object]:
        return (self._by_name.get(name) or AdapterActivity()).to_json()
