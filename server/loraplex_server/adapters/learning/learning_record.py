"""The ``refinement`` entry of a card's provenance: what learning from examples has achieved.

initial adapter  finished: false, order, job
result           finished: true, order, gained, beats_turns, steps, timed_out, budget_s

``order`` is the key of the request, ``job`` the id of a job that may still improve the adapter.
"""

from collections.abc import Mapping

from loraplex_adapter_store.names.card import AdapterCard
from loraplex_adapter_store.report import JsonValue

Record = Mapping[str, JsonValue]


def record_of(card: AdapterCard | None) -> Record:
    """Return the record of a card. It is empty for adapters that learn nothing."""
    record = None if card is None else card.provenance.get("refinement")
    return record if isinstance(record, dict) else {}


def without_job(record: Record) -> dict[str, JsonValue]:
    return {key: value for key, value in record.items() if key != "job"}


def serves(card: AdapterCard | None) -> str | None:
    """Return "learnt" or "draft" (the initial adapter), as jobs and answers show it."""
    if card is None:
        return None
    return "learnt" if record_of(card).get("gained") is True else "draft"


def answers_chats(card: AdapterCard | None) -> bool:
    """Return True if the finished adapter does as well as the base with the pairs as turns."""
    record = record_of(card)
    gained = record.get("finished") is True and record.get("gained") is True
    return gained and record.get("beats_turns") is not False


def is_final(record: Record, budget_s: float | None) -> bool:
    """Return True if a job of ``budget_s`` (None: the default) could not improve the adapter.

    Only a job that ran out of time can be improved, by a request with a larger budget.
    """
    if record.get("finished") is not True:
        return False
    spent_s = record.get("budget_s")
    return (
        budget_s is None
        or record.get("timed_out") is not True
        or (isinstance(spent_s, int | float) and budget_s <= spent_s)
    )
