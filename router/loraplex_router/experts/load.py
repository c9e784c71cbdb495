"""The use of experts over a window of time: counts, entropy and imbalance."""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import add

Counts = Mapping[str, tuple[int, ...]]  # place (MLP block or projection) → rows per expert


def entropy(counts: Sequence[int]) -> float:
    """Return the entropy of rows over experts, from 0 (one expert) to 1 (all experts equally)."""
    total = sum(counts)
    if total == 0 or len(counts) < 2:
        return 0.0
    shares = [count / total for count in counts if count]
    return sum(-share * math.log(share) for share in shares) / math.log(len(counts))


def imbalance(counts: Sequence[int]) -> float:
    """Return the busiest expert's rows over the mean: 1 is best, the number of experts worst."""
    total = sum(counts)
    return max(counts) * len(counts) / total if total else 0.0


@dataclass(frozen=True, slots=True)
class ExpertLoad:
    """The use of one adapter's experts over the last ``window_s`` seconds."""

    counts: Counts
    window_s: float

    @property
    def n_rows(self) -> int:
        """Rows × experts per row × places."""
        return sum(sum(counts) for counts in self.counts.values())

    @property
    def entropy(self) -> float:
        """The mean over the places in use."""
        used = [entropy(counts) for counts in self.counts.values() if any(counts)]
        return sum(used) / len(used) if used else 0.0

    @property
    def imbalance(self) -> float:
        used = [imbalance(counts) for counts in self.counts.values() if any(counts)]
        return sum(used) / len(used) if used else 0.0

    @property
    def per_expert(self) -> tuple[int, ...]:
        """The rows of each expert, summed over all places."""
        width = max((len(counts) for counts in self.counts.values()), default=0)
        sums = [0] * width
        for counts in self.counts.values():
            for expert, count in enumerate(counts):
                sums[expert] += count
        return tuple(sums)

    @staticmethod
    def joined(loads: Iterable[ExpertLoad]) -> ExpertLoad:
        """Add up the counts of one adapter on several replicas."""
        counts: dict[str, tuple[int, ...]] = {}
        window_s = 0.0
        for load in loads:
            window_s = max(window_s, load.window_s)
            for place, added in load.counts.items():
                before = counts.get(place, (0,) * len(added))
                counts[place] = tuple(map(add, before, added))
        return ExpertLoad(counts, window_s)

    def to_json(self) -> dict[str, object]:
        return {
            "window_s": round(self.window_s, 1),
            "n_picks": self.n_rows,
            "entropy": round(self.entropy, 4),
            "imbalance": round(self.imbalance, 4),
            "places": [
                {
                    "place": place,
                    "counts": list(counts),
                    "entropy": round(entropy(counts), 4),
                    "imbalance": round(imbalance(counts), 4),
                }
                for place, counts in sorted(self.counts.items(), key=_natural)
            ],
        }


class LoadHistory:
    """Samples of one adapter's running totals, for any window up to ``keep_s``.

    Totals may restart from zero, when the adapter leaves the device and comes back.
    """

    def __init__(self, *, sample_s: float = 5.0, keep_s: float = 600.0) -> None:
        self._sample_s = sample_s
        self._samples: deque[tuple[float, Counts]] = deque(maxlen=int(keep_s / sample_s) + 2)
        self._base: dict[str, tuple[int, ...]] = {}  # counted before the last restart
        self._seen: Counts = {}

    def record(self, now: float, totals: Counts) -> None:
        """Add a sample. ``totals`` count from the adapter's load; ``now`` must not decrease."""
        if any(sum(totals.get(place, ())) < sum(old) for place, old in self._seen.items()):
            self._base = dict(self._totals())
        self._seen = dict(totals)
        if not self._samples:
            self._samples.append((now, {place: (0,) * len(c) for place, c in totals.items()}))
        if now - self._samples[-1][0] >= self._sample_s:
            self._samples.append((now, self._totals()))

    def over(self, now: float, window_s: float) -> ExpertLoad:
        """Return the use since the youngest sample of at least ``window_s``, or since the first."""
        if not self._samples:
            return ExpertLoad({}, 0.0)
        old_time, old = self._samples[0]
        for time, counts in self._samples:
            if now - time < window_s:
                break
            old_time, old = time, counts
        new = self._totals()
        difference = {
            place: tuple(
                n - o for n, o in zip(counts, old.get(place, (0,) * len(counts)), strict=True)
            )
            for place, counts in new.items()
        }
        return ExpertLoad(difference, now - old_time)

    def _totals(self) -> Counts:
        return {
            place: tuple(
                n + b
                for n, b in zip(counts, self._base.get(place, (0,) * len(counts)), strict=True)
            )
            for place, counts in self._seen.items()
        }


def _natural(item: tuple[str, object]) -> list[tuple[bool, int, str]]:
    """Sort layer 2 before layer 10."""
    parts = re.split(r"(\d+)", item[0])
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]
