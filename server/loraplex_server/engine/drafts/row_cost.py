"""The seconds of a step by its rows, relative to the same step without drafts.

A step of few rows takes as long as reading the weights, so more rows cost little; a step of many
rows takes as long as its arithmetic. Where one becomes the other depends on the machine, the
weights and the adapters, so it is measured.
"""

from collections.abc import Hashable

MAX_ROWS = 16  # of a step with drafts
_CHEAP_ROWS, _CHEAP, _DEAR = 5, 0.03, 0.13  # cost of another row before anything is measured
_LEARNING = 0.1
_FARTHEST = 0.3  # of a sample from the estimate: a step may have waited for other processes


class RowCost:
    """The estimate. Engine thread."""

    def __init__(self) -> None:
        self._ratios = [1.0]  # by rows; 0 rows are not asked for
        for n_rows in range(1, MAX_ROWS + 1):
            step = 0.0 if n_rows == 1 else _CHEAP if n_rows <= _CHEAP_ROWS else _DEAR
            self._ratios.append(self._ratios[-1] + step)
        self._key: Hashable = None
        self._plain_s = 0.0  # of a step of the requests ``_key`` without drafts

    def of(self, n_rows: int) -> float:
        """Return the seconds of a step with ``n_rows`` relative to one with a single row."""
        return self._ratios[n_rows]

    def knows(self, key: Hashable) -> bool:
        """Return True if a step of these requests without drafts has been measured."""
        return self._key == key

    def measured(self, key: Hashable, n_rows: int, n_drafts: int, seconds: float) -> None:
        """Fits the estimate to a step of the requests ``key``. ``n_rows`` include the drafts."""
        if n_drafts == 0:
            known = self._plain_s if self.knows(key) else seconds
            self._key, self._plain_s = key, _moved(known, seconds)
        elif self.knows(key):
            sample = self._ratios[n_rows - n_drafts] * seconds / self._plain_s
            self._ratios[n_rows] = max(1.0, _moved(self._ratios[n_rows], sample))


def _moved(estimate: float, sample: float) -> float:
    farthest = _FARTHEST * estimate
    return estimate + _LEARNING * max(-farthest, min(sample - estimate, farthest))
