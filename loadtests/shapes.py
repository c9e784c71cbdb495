"""Load over time: pure functions of the seconds since a phase began.

``level(t)`` is a number of users (closed loop) or of arrivals per second (open loop). An open loop
keeps coming whether the server answers or not, so it is the one that shows overload honestly.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Constant:
    value: float

    def level(self, t: float, seconds: float) -> float:
        return self.value


@dataclass(frozen=True, slots=True)
class Steps:
    """Levels that each last an equal part of the phase."""

    levels: tuple[float, ...]

    def level(self, t: float, seconds: float) -> float:
        index = int(t / seconds * len(self.levels))
        return self.levels[min(max(index, 0), len(self.levels) - 1)]


@dataclass(frozen=True, slots=True)
class Spike:
    """A spike: ``high`` for the middle fifth of the phase, else ``low``."""

    low: float
    high: float

    def level(self, t: float, seconds: float) -> float:
        return self.high if 0.4 <= t / seconds < 0.6 else self.low


@dataclass(frozen=True, slots=True)
class Sawtooth:
    """A sawtooth that climbs from ``low`` to ``high`` in ``period_s`` and falls at once."""

    low: float
    high: float
    period_s: float

    def level(self, t: float, seconds: float) -> float:
        return self.low + (self.high - self.low) * math.fmod(t, self.period_s) / self.period_s


Shape = Constant | Steps | Spike | Sawtooth


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError(f"a load level must be a number of zero or more, not {value!r}")
    return float(value)


def _steps(table: Mapping[str, object]) -> Steps:
    levels = table["levels"]
    if not isinstance(levels, list) or not levels:
        raise ValueError(f"levels must be a list of numbers, not {levels!r}")
    return Steps(tuple(_number(item) for item in levels))


SHAPES: Mapping[str, Callable[[Mapping[str, object]], Shape]] = {
    "constant": lambda table: Constant(_number(table["level"])),
    "steps": _steps,
    "spike": lambda table: Spike(_number(table["low"]), _number(table["high"])),
    "sawtooth": lambda table: Sawtooth(
        _number(table["low"]), _number(table["high"]), _number(table["period_s"])
    ),
}


def parse_shape(value: object) -> Shape:
    """Parse a number or a table with ``kind``. Raises ValueError."""
    if not isinstance(value, dict):
        return Constant(_number(value))
    kind = value.get("kind")
    if kind not in SHAPES:
        raise ValueError(f"unknown shape {kind!r}; known: {', '.join(SHAPES)}")
    try:
        return SHAPES[str(kind)](value)
    except KeyError as error:
        raise ValueError(f"shape {kind!r} needs {error}") from None
