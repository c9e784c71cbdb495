"""The other processes of a cluster, as the application of a gateway asks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from loraplex_router.experts import ExpertLoad
from loraplex_server.faults import Degradation

if TYPE_CHECKING:
    from .state import AppState

__all__ = ["Calls", "Fleet"]


class Calls(NamedTuple):
    """Calls for text and vectors, as JSON; see ``CallRecord``."""

    running: list[dict[str, object]]  # oldest first
    ended: list[dict[str, object]]  # newest first


class Fleet(Protocol):
    """On the event loop. What a process does not say in time is left out; nothing is raised."""

    async def metrics_page(self, state: AppState) -> bytes:
        """/metrics of all processes."""

    @property
    def degraded(self) -> Sequence[Degradation]:
        """Parts that keep failing in engine replicas, as they said a second ago."""

    async def view(self, state: AppState) -> dict[str, object]:
        """Who holds what, as GET /v1/cluster says it."""

    async def live(self, seen: Mapping[str, object]) -> dict[str, object]:
        """What GET /v1/live says: ``seen`` by this process, and what it cannot see."""

    async def expert_load(self, digest: str, window_s: float) -> ExpertLoad:
        """Of an adapter with routed experts, on all engines."""

    async def unload(self, digest: str) -> int:
        """Takes an idle content out of the host memory of all processes that answer HTTP.

        Returns how many requests of theirs keep it where they run.
        """

    async def calls(self, tenant: str | None) -> Calls:
        """Of all processes that answer HTTP. ``tenant`` None: of all."""
