"""What a process with the HTTP application tells others of its calls."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Literal

from loraplex_server.metrics.call_log import CallLog

__all__ = ["FrontCalls", "Role"]

Role = Literal["gateway", "desk"]


@dataclass(frozen=True, slots=True)
class FrontCalls:
    """Crosses processes."""

    replica: str
    role: Role
    running: list[dict[str, object]]  # oldest first
    ended: list[dict[str, object]]  # newest first

    @staticmethod
    def of(
        replica: str, role: Role, calls: CallLog, tenant: str | None, n_ended: int
    ) -> FrontCalls:
        """``tenant`` None: of all. ``n_ended``: at most so many that have ended."""
        return FrontCalls(
            replica,
            role,
            [record.to_json() for record in calls.running(tenant)],
            [record.to_json() for record in islice(calls.ended(tenant), n_ended)],
        )
