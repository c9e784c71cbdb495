"""Per-adapter counters with a bounded number of series, each of them monotone.

An adapter counts to its own series while it is among the shown ones and to ``other`` otherwise,
so being promoted or demoted never makes a counter run backwards.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["OTHER", "AdapterCounters", "AdapterUsage"]

OTHER = "other"
_DECAY = 0.5  # of the scores, at each review
_LEAD = 1.5  # by which a newcomer must beat the weakest shown adapter
_MAX_SCORES = 10_000


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
        """Where a request for ``name`` counts; keep it for the whole request."""
        if name in self._scores or len(self._scores) < _MAX_SCORES:
            self._scores[name] = self._scores.get(name, 0.0) + 1.0
        shown = self._shown.get(name)
        if shown is None and len(self._shown) < self._n_shown:
            shown = self._shown[name] = AdapterCounters(name)
        return shown or self._other

    def review(self) -> None:
        """Lets busy adapters take the places of idle ones. Call every few seconds."""
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
