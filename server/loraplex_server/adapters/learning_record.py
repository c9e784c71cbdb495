"""What a card says of learning from examples: `refinement` of its provenance.

draft    finished: false, order, job ─ its job has ended without a result ─► ended
result   finished: true, order, gained, steps, timed_out, budget_s
            └ learnt again: job ─ nothing better came of it ─► ended, or as before

``job`` without ``ended`` is one that runs, or that the server's end cut off.
"""

from __future__ import annotations

from collections.abc import Mapping

from loraplex_adapter_store.card import AdapterCard
from loraplex_adapter_store.errors import StoreError
from loraplex_adapter_store.report import JsonValue
from loraplex_generation.turns import beats_turns
from loraplex_server.api.errors import ApiError, from_store

from .jobs import JobCancelled

__all__ = [
    "Record",
    "answers_chats",
    "begun",
    "draft_record",
    "ended",
    "how_ended",
    "is_better",
    "is_learning",
    "is_result",
    "last_budget_s",
    "may_learn_again",
    "record_of",
    "serves",
    "settled",
    "why_lost",
]

Record = Mapping[str, JsonValue]
_CANCELLED = "cancelled"  # as ``ended``, which is an error's code else


def record_of(card: AdapterCard | None) -> Record:
    """Empty for one that learns nothing."""
    record = None if card is None else card.provenance.get("refinement")
    return record if isinstance(record, dict) else {}


def draft_record(job: str, order: str) -> Record:
    return {"finished": False, "job": job, "order": order}


def begun(record: Record, job: str) -> Record:
    """A job goes on from it."""
    return {**_without_job(record), "job": job}


def ended(record: Record, how: str, budget_s: float | None) -> Record:
    """Its job has ended without a result. ``budget_s``: that was not enough; None: who knows."""
    spent: Record = {} if budget_s is None else {"budget_s": budget_s}
    return {**record, **spent, "ended": how}


def how_ended(error: Exception) -> str:
    if isinstance(error, JobCancelled):
        return _CANCELLED
    told = from_store(error) if isinstance(error, StoreError) else error
    return told.code if isinstance(told, ApiError) else "failed"


def why_lost(record: Record) -> ApiError | None:
    """For a job that nobody remembers any more; None: it was cancelled."""
    how = record.get("ended")
    if how == _CANCELLED:
        return None
    if how is None:
        told = "the server went down while it learnt; what answers stays, order it again"
        return ApiError(503, told, code="server_restarted")
    return ApiError(503, "it learnt nothing; what answers stays, order it again", code=str(how))


def settled(record: Record, budget_s: float) -> Record:
    """Its job found nothing better in ``budget_s``."""
    return {**_without_job(record), "budget_s": budget_s}


def is_learning(record: Record) -> bool:
    """Unless the server's end cut its job off."""
    return "job" in record and "ended" not in record


def is_result(record: Record) -> bool:
    """Whether a job has ended for it, whatever was gained."""
    return record.get("finished") is True


def serves(card: AdapterCard | None) -> str | None:
    """Of a job that ``card`` answers for: "draft" or "learnt"."""
    if card is None:
        return None
    return "learnt" if record_of(card).get("gained") is True else "draft"


def answers_chats(card: AdapterCard | None) -> bool:
    """Whether ``card``, learnt or a draft that nothing beat, does better than turns."""
    record = record_of(card)
    return is_result(record) and beats_turns(record)


def may_learn_again(record: Record, budget_s: float) -> bool:
    """Whether a job of ``budget_s`` could make something better of it: a draft, always."""
    if not is_result(record):
        return True
    return record.get("timed_out") is True and budget_s > (last_budget_s(record) or 0.0)


def last_budget_s(record: Record) -> float | None:
    """Of the last job that time cut off; None: there was none."""
    spent = record.get("budget_s")
    return float(spent) if isinstance(spent, int | float) else None


def is_better(new: Record, old: Record) -> bool:
    """Whether the result ``new`` is better founded than ``old``, a result or a draft."""
    if old.get("gained") is not True:
        return True
    if new.get("gained") is not True:
        return False
    return new.get("timed_out") is not True or _steps(new) >= _steps(old)


def _steps(record: Record) -> int:
    steps = record.get("steps")
    return steps if isinstance(steps, int) else 0


def _without_job(record: Record) -> dict[str, JsonValue]:
    return {key: value for key, value in record.items() if key not in ("job", "ended")}
