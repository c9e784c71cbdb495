"""Bounds of waits in real seconds, on machines where other processes share the cores."""

import functools
from collections.abc import Callable
from contextlib import suppress
from typing import ParamSpec

_P = ParamSpec("_P")
_N_MEASUREMENTS = 3


class TooSlow(AssertionError):
    """A measurement that broke its bound."""


def check_below(measured: float, bound: float, what: object = "") -> None:
    """Raises TooSlow unless ``measured`` is below ``bound``."""
    if not measured < bound:
        raise TooSlow(f"{measured:.3g} is not below {bound:.3g} {what}")


def broken_only_if_each_time(test: Callable[_P, None]) -> Callable[_P, None]:
    """Repeat a test that raises TooSlow: it fails if each of three measurements does.

    What an attack delays, it delays each time. A moment in which the machine gave the server no
    time does not come three times. All other failures count at once.
    """

    @functools.wraps(test)
    def measured(*args: _P.args, **kwargs: _P.kwargs) -> None:
        for _ in range(_N_MEASUREMENTS - 1):
            with suppress(TooSlow):
                return test(*args, **kwargs)
        return test(*args, **kwargs)

    return measured
