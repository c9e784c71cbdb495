"""What a process with the HTTP application tells others of its calls."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Literal

from loraplex_server.api.state import AppState
from loraplex_server.metrics.call_log import CallLog

__all__ = ["FrontCalls", "FrontSpeed", "Role"]

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


@dataclass(frozen=True, slots=True)
class FrontSpeed:
    """How fast a process answers now. Crosses processes."""

    prompt_tokens_per_s: float
    output_tokens_per_s: float
    first_token_s: list[float]  # of the last minute, ascending
    gap_s: list[float]  # between tokens, likewise
    running: list[dict[str, object]]  # calls, oldest first

    @staticmethod
    def of(services: AppState) -> FrontSpeed:
        """Event loop only."""
        seen, calls = services.live_view.to_json(), services.metrics.calls
        rates, rows = seen["tokens_per_s"], seen["rows"]
        assert isinstance(rates, dict)
        assert isinstance(rows, list)
        return FrontSpeed(
            rates["prompt"],
            rates["output"],
            calls.first_token_s.values(),
            calls.gap_s.values(),
            rows,
        )
