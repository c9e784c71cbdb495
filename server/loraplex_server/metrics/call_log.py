"""The calls that run and the last ones that ended, for people to look at: no prompt, no answer.

begin ──► adapter chosen ──► queued ──► tokens … ──► end
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

__all__ = ["N_ENDED", "CallLog", "CallRecord", "ChosenBy", "Recent", "percentile"]

N_ENDED = 200  # calls of all tenants together
_N_RECENT = 2048
_WINDOW_S = 60.0  # how far back percentiles look

ChosenBy = Literal["base", "name", "mixture", "auto", "description"]


@dataclass(slots=True, eq=False)
class CallRecord:
    """One call for text or vectors. Written on the event loop, by the code that answers it."""

    id: str
    path: str
    tenant: str  # "" without keys
    started: float = field(default_factory=time.time)  # seconds since the epoch
    chosen_by: ChosenBy = "base"
    adapter: str | None = None  # ``name@digest`` or ``base``; None: none was found
    n_choices: int = 1
    n_prompt: int = 0
    n_output: int = 0
    load_s: float | None = None  # waited for the adapter
    queue_s: float | None = None  # known with the first token
    first_token_s: float | None = None  # since the call was submitted
    seconds: float | None = None  # None: it runs
    status: int | None = None
    error: str | None = None  # its code
    prompt: str | None = None  # its beginning, where the operator allows it

    def to_json(self) -> dict[str, object]:
        if self.seconds is not None:
            state = "ended" if self.error is None else "failed"
        else:
            state = "waiting" if self.first_token_s is None else "answering"
        return {
            "id": self.id,
            "path": self.path,
            "tenant": self.tenant or None,
            "started": self.started,
            "state": state,
            "adapter": self.adapter,
            "chosen_by": self.chosen_by,
            "n_choices": self.n_choices,
            "prompt_tokens": self.n_prompt,
            "output_tokens": self.n_output,
            "load_s": self.load_s,
            "queue_s": self.queue_s,
            "first_token_s": self.first_token_s,
            "seconds": self.seconds,
            "status": self.status,
            "error": self.error,
            "prompt": self.prompt,
        }


class Recent:
    """The newest numbers of a kind, with the time they came at."""

    def __init__(self) -> None:
        self._values: deque[tuple[float, float]] = deque(maxlen=_N_RECENT)

    def add(self, value: float, now: float) -> None:
        self._values.append((now, value))

    def values(self) -> list[float]:
        """Of the last minute, ascending."""
        since = perf_counter() - _WINDOW_S
        return sorted(value for at, value in self._values if at >= since)


class CallLog:
    """Event loop only."""

    def __init__(self) -> None:
        self._running: dict[CallRecord, None] = {}
        self._ended: deque[CallRecord] = deque(maxlen=N_ENDED)
        self.first_token_s = Recent()
        self.gap_s = Recent()  # between the tokens of an answer

    def begin(self, record: CallRecord) -> None:
        self._running[record] = None

    def end(self, record: CallRecord, *, seconds: float, status: int) -> None:
        record.seconds, record.status = seconds, status
        if record.error is None and status >= 400:
            record.error = "client_left" if status == 499 else str(status)
        self._running.pop(record, None)
        self._ended.append(record)

    def running(self, tenant: str | None) -> Iterator[CallRecord]:
        """Oldest first. ``tenant`` None: of all."""
        return (r for r in self._running if tenant is None or r.tenant == tenant)

    def ended(self, tenant: str | None) -> Iterator[CallRecord]:
        """Newest first, likewise."""
        return (r for r in reversed(self._ended) if tenant is None or r.tenant == tenant)


def percentile(ascending: list[float], share: float) -> float | None:
    """The nearest value that exists; None of nothing."""
    if not ascending:
        return None
    return ascending[min(len(ascending) - 1, int(share * len(ascending)))]
