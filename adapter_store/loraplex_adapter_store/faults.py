"""How the store, and every other part, tells of its own failures: not of refused requests."""

from __future__ import annotations

from typing import Protocol

__all__ = ["FaultLog", "NoFaultLog"]


class FaultLog(Protocol):
    """Any thread; quick; never raises. ``part`` is one of the server's list of parts."""

    def failed(self, part: str, error: BaseException) -> None:
        """``part`` could not do what it is there for."""

    def worked(self, part: str) -> None:
        """``part`` did what it is there for: what failed before is over."""


class NoFaultLog:
    """For a store or an engine without a server."""

    def failed(self, part: str, error: BaseException) -> None:
        pass

    def worked(self, part: str) -> None:
        pass
