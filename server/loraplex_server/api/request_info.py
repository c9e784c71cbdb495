"""What the server knows of one HTTP request while it runs; shared through the ASGI scope."""

from __future__ import annotations

import contextvars
from dataclasses import dataclass, field
from time import perf_counter

from starlette.types import Scope as AsgiScope

from loraplex_server.api.middleware.rate_limit import Meter
from loraplex_server.api_keys import EVERY_ADAPTER, AdapterAccess, Scope
from loraplex_server.engine.client import TenantShare
from loraplex_server.metrics.call_log import CallRecord, ChosenBy

__all__ = ["CURRENT_REQUEST_ID", "BatchCaller", "RequestInfo", "batch_caller_of", "info_of"]

_KEY = "loraplex.request"
_BATCH = "loraplex.batch"

# Read by the log formatter only: each request runs in a task, hence in a context, of its own.
CURRENT_REQUEST_ID: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "loraplex_request_id", default=None
)


@dataclass(slots=True)
class RequestInfo:
    id: str
    started: float = field(default_factory=perf_counter)
    key_id: str = ""  # of the API key; "" without keys
    tenant: str = ""  # of the API key; "" without keys: there is one tenant
    share: TenantShare = field(default_factory=TenantShare)  # of the engine
    scopes: frozenset[Scope] = frozenset()
    may_change: bool = False  # whether the same caller would be let change adapters
    access: AdapterAccess = EVERY_ADAPTER
    meter: Meter | None = None  # of the API key, if it is limited
    adapter: str | None = None  # for x-loraplex-adapter and the access log
    record: CallRecord | None = None  # of a call for text or vectors
    n_prompt_tokens: int | None = None
    n_output_tokens: int | None = None

    def attach(self, scope: AsgiScope) -> None:
        scope[_KEY] = self

    def chose(self, adapter: str, chosen_by: ChosenBy) -> None:
        """``adapter``: as ``ResolvedAdapter.header`` says."""
        self.adapter = adapter
        if self.record is not None:
            self.record.adapter, self.record.chosen_by = adapter, chosen_by

    def failed(self, code: str) -> None:
        """Of the error that the answer or its stream ends with."""
        if self.record is not None:
            self.record.error = code


def info_of(scope: AsgiScope) -> RequestInfo:
    info = scope[_KEY]
    assert isinstance(info, RequestInfo)
    return info


@dataclass(frozen=True, slots=True)
class BatchCaller:
    """In whose name the lines of a batch are answered. Only the server itself attaches one."""

    key_id: str
    tenant: str

    def attach(self, scope: AsgiScope) -> None:
        scope[_BATCH] = self


def batch_caller_of(scope: AsgiScope) -> BatchCaller | None:
    """None for a call that came from outside."""
    caller = scope.get(_BATCH)
    assert caller is None or isinstance(caller, BatchCaller)
    return caller
