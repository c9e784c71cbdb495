"""Collects what the users report, and sums up a phase."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .scenario import Phase, Slo
from .streaming import Outcome

__all__ = ["PhaseRecord", "Request", "percentile"]


@dataclass(frozen=True, slots=True)
class Request:
    family: str
    name: str | None
    sent_at: float  # seconds since the counted part of the phase began
    outcome: Outcome
    first_use: bool  # of this adapter in this run

    def good(self, slo: Slo) -> bool:
        found = self.outcome
        if found.error or found.refused or found.ttft_s is None:
            return False
        mean_gap = sum(found.gaps_s) / len(found.gaps_s) if found.gaps_s else 0.0
        return found.ttft_s <= slo.ttft_s and mean_gap <= slo.itl_s


@dataclass
class PhaseRecord:
    """Requests that were sent while the phase counted."""

    phase: Phase
    used: set[str] = field(default_factory=set)  # adapters, shared by the phases of a run
    requests: list[Request] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)  # names that churn removed
    n_unsent: int = 0

    def on_request(self, request_type: str, context: dict[str, Any], **_: Any) -> None:
        """Locust's listener."""
        if request_type != "E2E":
            return
        ask, outcome = context["ask"], context["outcome"]
        if outcome.status == 404 and ask.name in self.gone:
            outcome.error = None  # it was removed while the request was under way
            outcome.retry_after = None
        first = ask.name is not None and ask.name not in self.used
        if ask.name is not None:
            self.used.add(ask.name)
        if 0 <= context["sent_at"] < self.phase.seconds:
            self.requests.append(Request(ask.family, ask.name, context["sent_at"], outcome, first))

    def summary(self, slo: Slo) -> dict[str, Any]:
        seconds = self.phase.seconds
        served = [r for r in self.requests if r.outcome.ttft_s is not None and not r.outcome.error]
        lost = [r for r in self.requests if r.outcome.error]
        return {
            "label": self.phase.label,
            "kind": self.phase.kind,
            "sweep": self.phase.sweep,
            "x": self.phase.x,
            "seconds": seconds,
            "requests": len(self.requests),
            "served": len(served),
            "refused": sum(r.outcome.refused for r in self.requests),
            "gone": sum(r.outcome.status == 404 and not r.outcome.error for r in self.requests),
            "lost": len(lost),
            "first_error": lost[0].outcome.error if lost else None,
            "unsent": self.n_unsent,
            "distinct_adapters": len({r.name for r in served if r.name is not None}),
            "requests_per_s": round(len(served) / seconds, 3),
            "goodput_per_s": round(sum(r.good(slo) for r in self.requests) / seconds, 3),
            # Tokens by where they arrived, so that a phase's tail does not count to it.
            "output_tok_s": round(self._tokens_within(served) / seconds, 1),
            "ttft_s": _percentiles([r.outcome.ttft_s or 0.0 for r in served]),
            "itl_ms": _percentiles([1000 * gap for r in served for gap in r.outcome.gaps_s]),
            "e2e_s": _percentiles([r.outcome.e2e_s for r in served]),
            "first_use_ttft_s": _percentiles(
                [r.outcome.ttft_s or 0 for r in served if r.first_use]
            ),
            "again_ttft_s": _percentiles(
                [r.outcome.ttft_s or 0 for r in served if not r.first_use]
            ),
            "by_family": {
                family: {
                    "served": len(rows),
                    "ttft_s": _percentiles([r.outcome.ttft_s or 0.0 for r in rows]),
                    "itl_ms": _percentiles([1000 * gap for r in rows for gap in r.outcome.gaps_s]),
                }
                for family in sorted({r.family for r in served})
                if (rows := [r for r in served if r.family == family])
            },
        }

    def _tokens_within(self, served: Sequence[Request]) -> float:
        """Tokens that arrived before the counted part ended, spread evenly over a request."""
        total = 0.0
        for request in served:
            found = request.outcome
            begin = request.sent_at + (found.ttft_s or 0.0)
            end = request.sent_at + found.e2e_s
            if end <= self.phase.seconds:
                total += found.n_tokens
            elif begin < self.phase.seconds:
                total += found.n_tokens * (self.phase.seconds - begin) / (end - begin)
        return total


def percentile(values: Sequence[float], percent: float) -> float | None:
    if not values:
        return None
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))], 4)


def _percentiles(values: Sequence[float]) -> dict[str, float | None]:
    return {f"p{percent}": percentile(values, percent) for percent in (50, 95, 99)}
