"""Whether the server is ready or draining, and what it accepts."""

from __future__ import annotations

from enum import Enum

from loraplex_server.engine.client import EngineClient

from .errors import unavailable

__all__ = ["Lifecycle", "ServerStatus"]


class ServerStatus(Enum):
    READY = "ready"
    DRAINING = "draining"  # finishes what it has, takes nothing new


class Lifecycle:
    def __init__(self, engine: EngineClient) -> None:
        self.status = ServerStatus.READY
        self._engine = engine

    def start_draining(self) -> None:
        self.status = ServerStatus.DRAINING

    def check_admitting(self) -> None:
        """Raises ApiError (503 with Retry-After) while draining, or when the engine is dead."""
        self.check_engine()
        if self.status is ServerStatus.DRAINING:
            raise unavailable("the server is shutting down; ask another replica", "server_draining")

    def check_engine(self) -> None:
        """Raises ApiError (503) when the engine is dead: nothing it has is changed any more."""
        if not self._engine.alive:
            raise unavailable("the engine has stopped", "engine_dead")
