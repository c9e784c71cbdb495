"""Memory and open files of a server's life, once a second."""

import os
import statistics
import time
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

_WARM_UP_S = 300.0  # until caches are full; longer on a machine that others use
_WINDOW_S = 15.0
_SHORTEST_S = 120.0  # after the warm-up: a slope over less says nothing
_MAX_SLOPE = 3.0  # MiB a minute
_MAX_MORE_FILES = 12  # than in the second third


@dataclass
class Life:
    """The life of a process, from its start to its end."""

    pid: int
    began: float = field(default_factory=time.monotonic)
    samples: list[tuple[float, float, int]] = field(default_factory=list)  # s, MiB, files

    def sample(self) -> None:
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
            files = [os.readlink(fd) for fd in Path(f"/proc/{self.pid}/fd").iterdir()]
            n_files = sum(not file.startswith("socket:") for file in files)  # floods come and go
            kib = next(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmRSS:"))
        except (OSError, StopIteration):  # it has just been killed
            return
        self.samples.append((time.monotonic() - self.began, kib / 1024, n_files))

    @property
    def seconds(self) -> float:
        return self.samples[-1][0] if self.samples else 0.0

    def slope(self) -> float | None:
        """MiB a minute after the warm-up; None if the life was too short.

        The median of the slopes between any two windows, of the least in each: what a request holds
        for a moment is no growth, and a leak lifts the least, too.
        """
        windows: dict[int, float] = {}
        for s, mib, _ in self.samples:
            if s > _WARM_UP_S:
                window = int(s / _WINDOW_S)
                windows[window] = min(mib, windows.get(window, mib))
        if len(windows) < 3 or _WINDOW_S * (max(windows) - min(windows)) < _SHORTEST_S:
            return None
        slopes = [(windows[b] - windows[a]) / (b - a) for a, b in combinations(sorted(windows), 2)]
        return statistics.median(slopes) * 60 / _WINDOW_S

    def problems(self) -> list[str]:
        found = []
        slope = self.slope()
        if slope is not None and slope > _MAX_SLOPE:
            found.append(f"memory grows by {slope:.1f} MiB a minute")
        third = len(self.samples) // 3
        if third >= 10:
            first = statistics.median(n for _, _, n in self.samples[third : 2 * third])
            last = statistics.median(n for _, _, n in self.samples[2 * third :])
            if last > first + _MAX_MORE_FILES:
                found.append(f"open files went from {first:g} to {last:g}")
        return found

    def to_json(self) -> dict[str, object]:
        middle = self.samples[len(self.samples) // 2 :] or [(0.0, 0.0, 0)]
        return {
            "seconds": round(self.seconds),
            "rss_mib": [round(middle[0][1], 1), round(middle[-1][1], 1)],
            "slope_mib_per_minute": None if self.slope() is None else round(self.slope() or 0.0, 2),
            "open_files": [middle[0][2], middle[-1][2]],
        }
