"""Measures the processor time of each callback of an event loop."""

import asyncio
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import pytest

Returned = TypeVar("Returned")


class Callback(NamedTuple):
    cpu_s: float
    what: str


class LoopWatch:
    """A watch of one thread's callbacks by processor time, which excludes the machine's other work.

    ``longest`` is cleared by whoever reads it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._longest = Callback(0.0, "")
        self._thread = 0
        run = asyncio.Handle._run

        def timed(handle: asyncio.Handle) -> None:
            if threading.get_ident() != self._thread:
                run(handle)
                return
            began = time.thread_time()
            run(handle)
            took = time.thread_time() - began
            if took > self._longest.cpu_s:
                self._longest = Callback(took, repr(handle))

        monkeypatch.setattr(asyncio.Handle, "_run", timed)

    def watch_this_thread(self) -> None:
        self._thread = threading.get_ident()

    def check(self, cpu_s: float, act: Callable[[], Returned]) -> Returned:
        """Do ``act`` and return what it returns; fail if a callback takes longer.

        Work that is always done takes too long each of three times. A cold cache or a collection
        of garbage does not.
        """
        for _ in range(3):
            self._longest = Callback(0.0, "")
            result = act()
            if self._longest.cpu_s < cpu_s:
                return result
        raise AssertionError(self._longest)
