"""Where the server is in its life, and what it takes in meanwhile."""

from __future__ import annotations

from enum import Enum

from .errors import unavailable

__all__ = ["Lifecycle", "ServerStatus"]


class ServerStatus(Enum):
    READY = "ready"
    DRAINING = "draining"  # finishes what it has, takes nothing new


class Lifecycle:
    def __init__(self) -> None:
        self.status = ServerStatus.READY

    def start_draining(self) -> None:
        self.status = ServerStatus.DRAINING

    def check_admitting(self) -> None:
        """Raises ApiError (503 with Retry-After) while draining."""
        if self.status is ServerStatus.DRAINING:
            raise unavailable("the server is shutting down; ask another replica", "server_draining")
