"""The running and recently ended calls, without their prompts and answers.

begin ──► adapter chosen ──► queued ──► tokens … ──► end
"""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Literal

N_ENDED = 200  # calls of all tenants together
_N_RECENT = 2048
_WINDOW_S = 60.0  # window of the percentiles

ChosenBy = Literal["base", "name", "mixture", "auto", "description"]


@dataclass(slots=True, eq=False)
class CallRecord:
    """A call for text or vectors. Event loop only; written by the code that answers the call."""

    id: str
    path: str
    tenant: str  # "" without keys
    started: float = field(default_factory=time.time)  # seconds since the epoch
    chosen_by: ChosenBy = "base"
    adapter: str | None = None  # ``name@digest`` or ``base``; None: not resolved
    n_choices: int = 1
    prompt_tokens: int = 0
    output_tokens: int = 0
    load_s: float | None = None  # time that the call waited for its adapter
    queue_s: float | None = None  # known with the first token
    first_token_s: float | None = None  # since submission
    seconds: float | None = None  # None while the call runs
    status: int | None = None
    error: str | None = None  # code of the error
    prompt: str | None = None  # first characters, if the operator allows it

    def to_json(self) -> dict[str, object]:
        if self.seconds is not None:
            state = "ended" if self.error is None else "failed"
        else:
            state = "waiting" if self.first_token_s is None else "answering"
        return {**asdict(self), "tenant": self.tenant or None, "state": state}


class Recent:
    """The newest measurements of one kind."""

    def __init__(self) -> None:
        self._values: deque[tuple[float, float]] = deque(maxlen=_N_RECENT)

    def add(self, value: float, now: float) -> None:
        self._values.append((now, value))

    def values(self) -> list[float]:
        """Return the values of the last minute, ascending."""
        since = perf_counter() - _WINDOW_S
        return sorted(value for at, value in self._values if at >= since)


class CallLog:
    """Owner of the records of calls. Event loop only."""

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
        """Yield the running calls, oldest first. ``tenant`` None: of all tenants."""
        return (r for r in self._running if tenant is None or r.tenant == tenant)

    def ended(self, tenant: str | None) -> Iterator[CallRecord]:
        """Yield the ended calls, newest first. ``tenant`` None: of all tenants."""
        return (r for r in reversed(self._ended) if tenant is None or r.tenant == tenant)


def percentile(ascending: list[float], share: float) -> float | None:
    """Return the nearest existing value, or None for no values."""
    if not ascending:
        return None
    return ascending[min(len(ascending) - 1, int(share * len(ascending)))]
