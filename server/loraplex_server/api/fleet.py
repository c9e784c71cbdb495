"""The interface of a gateway's application to the other processes of a cluster."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from loraplex_router.experts.load import ExpertLoad
from loraplex_server.health_tracker import Degradation
from loraplex_server.metrics.collector import LoraplexCollector


class Calls(NamedTuple):
    """Calls for text and vectors, as JSON; see ``CallRecord``."""

    running: list[dict[str, object]]  # oldest first
    ended: list[dict[str, object]]  # newest first


class Fleet(Protocol):
    """The other processes of a cluster, for calls on the event loop. Late answers are left out."""

    async def metrics_page(self, collector: LoraplexCollector) -> bytes:
        """Return the metrics of all processes."""

    @property
    def degraded(self) -> Sequence[Degradation]:
        """Parts that keep failing in engine replicas. The report may be a second old."""

    async def view(self, collector: LoraplexCollector) -> dict[str, object]:
        """Return the answer of GET /v1/cluster."""

    async def live(self, seen: Mapping[str, object]) -> dict[str, object]:
        """Return the answer of GET /v1/live. ``seen``: the activity of this process."""

    async def expert_load(self, digest: str, window_s: float) -> ExpertLoad:
        """Return the load of a routed adapter's experts on all engines."""

    async def unload(self, digest: str) -> int:
        """Unload idle content from the host memory of all HTTP processes.

        Returns the number of requests that still use the content.
        """

    async def calls(self, tenant: str | None) -> Calls:
        """Return the calls of all HTTP processes. ``tenant``: None for all tenants."""
