"""Collects the users' outcomes and summarises a phase."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .client import Outcome
from .scenario import Phase, Slo
from .traffic import LoadRequest


@dataclass(frozen=True, slots=True)
class _Record:
    request: LoadRequest
    sent_at: float  # seconds since the counted part of the phase began
    outcome: Outcome
    first_use: bool  # of this adapter in this run

    @property
    def served(self) -> bool:
        return self.outcome.ttft_s is not None and not self.outcome.error

    def within(self, slo: Slo) -> bool:
        ttft_s = self.outcome.ttft_s
        return (
            self.served
            and ttft_s is not None
            and ttft_s <= slo.ttft_s
            and self.outcome.tpot_s <= slo.tpot_s
        )


@dataclass
class PhaseRecord:
    """The records of a phase: latencies by time of sending, tokens by time of arrival."""

    phase: Phase
    used: set[str] = field(default_factory=set)  # adapters, shared by the phases of a run
    removed: set[str] = field(default_factory=set)  # names that churn removed
    n_unsent: int = 0
    _records: list[_Record] = field(default_factory=list)

    def on_request(self, request_type: str, context: dict[str, Any], **_: Any) -> None:
        """Record one outcome. Locust calls this listener."""
        if request_type != "E2E":
            return
        request, outcome = context["request"], context["outcome"]
        if outcome.status == 404 and request.name in self.removed:
            outcome.error = None  # it was removed while the request was under way
        first = request.name is not None and request.name not in self.used
        if request.name is not None:
            self.used.add(request.name)
        self._records.append(_Record(request, context["sent_at"], outcome, first))

    def summary(self, slo: Slo) -> dict[str, Any]:
        seconds = self.phase.seconds
        counted = [record for record in self._records if 0 <= record.sent_at < seconds]
        served = [record for record in counted if record.served]
        lost = [record for record in counted if record.outcome.error]
        families = sorted({record.request.family for record in served})
        return {
            "label": self.phase.label,
            "kind": self.phase.kind,
            "sweep": self.phase.sweep,
            "x": self.phase.x,
            "seconds": seconds,
            "requests": len(counted),
            "served": len(served),
            "refused": sum(record.outcome.refused for record in counted),
            "gone": sum(r.outcome.status == 404 and not r.outcome.error for r in counted),
            "lost": len(lost),
            "first_error": lost[0].outcome.error if lost else None,
            "unsent": self.n_unsent,
            "distinct_adapters": len({r.request.name for r in served if r.request.name}),
            "requests_per_s": round(len(served) / seconds, 3),
            "goodput_per_s": round(sum(r.within(slo) for r in counted) / seconds, 3),
            "output_tok_s": round(self._tokens_within() / seconds, 1),
            **_latencies(served),
            "e2e_s": _percentiles([r.outcome.e2e_s for r in served]),
            "first_use_ttft_s": _percentiles(_ttfts([r for r in served if r.first_use])),
            "again_ttft_s": _percentiles(_ttfts([r for r in served if not r.first_use])),
            "by_family": {
                family: {"served": len(rows), **_latencies(rows)}
                for family in families
                if len(families) > 1 and (rows := [r for r in served if r.request.family == family])
            },
        }

    def _tokens_within(self) -> float:
        """Return the tokens that arrived while the phase counted, spread evenly over each answer.

        Answers that began in the warm-up or end after the phase count with their part, so slow
        servers are not charged for a batch that overlaps an edge.
        """
        total = 0.0
        for record in self._records:
            found = record.outcome
            if not record.served:
                continue
            begin = record.sent_at + (found.ttft_s or 0.0)
            end = max(record.sent_at + found.e2e_s, begin + 1e-9)
            inside = min(end, self.phase.seconds) - max(begin, 0.0)
            total += found.n_tokens * max(inside, 0.0) / (end - begin)
        return total


def percentile(values: Sequence[float], percent: float) -> float | None:
    if not values:
        return None
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))], 4)


def _latencies(records: Sequence[_Record]) -> dict[str, dict[str, float | None]]:
    gaps = [1000 * gap for record in records for gap in record.outcome.gaps_s]
    return {"ttft_s": _percentiles(_ttfts(records)), "itl_ms": _percentiles(gaps)}


def _ttfts(records: Sequence[_Record]) -> list[float]:
    return [record.outcome.ttft_s or 0.0 for record in records]


def _percentiles(values: Sequence[float]) -> dict[str, float | None]:
    return {f"p{percent}": percentile(values, percent) for percent in (50, 95, 99)}
