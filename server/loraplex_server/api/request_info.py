"""The server's data about one running HTTP request, shared through the ASGI scope."""

import contextvars
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter

from starlette.requests import Request
from starlette.types import Scope as AsgiScope

from loraplex_server.api.middleware.rate_limit import Meter
from loraplex_server.call_log import CallRecord, ChosenBy
from loraplex_server.engine.requests.client import TenantShare
from loraplex_server.errors import ApiError
from loraplex_server.settings.api_keys import EVERY_ADAPTER, AdapterAccess, Scope

_KEY = "loraplex.request"
_BATCH = "loraplex.batch"

# Read by the log formatter. Each request runs in its own task, hence in its own context.
CURRENT_REQUEST_ID: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "loraplex_request_id", default=None
)


@dataclass(slots=True)
class RequestInfo:
    """The id, API key, access, adapter and token counts of a request."""

    id: str
    started: float = field(default_factory=perf_counter)
    key_id: str = ""  # of the API key; "" without keys
    tenant: str = ""  # of the API key; "" without keys
    share: TenantShare = field(default_factory=TenantShare)  # of the engine
    scopes: frozenset[Scope] = frozenset()
    may_change: bool = False  # the caller may change adapters
    access: AdapterAccess = EVERY_ADAPTER
    meter: Meter | None = None  # of the API key, if it is limited
    adapter: str | None = None  # for x-loraplex-adapter and the access log
    record: CallRecord | None = None  # of a call for text or vectors
    n_prompt_tokens: int | None = None
    n_output_tokens: int | None = None

    def attach(self, scope: AsgiScope) -> None:
        scope[_KEY] = self

    def chose(self, adapter: str, chosen_by: ChosenBy) -> None:
        """Record the adapter, in the form of ``ResolvedAdapter.header``."""
        self.adapter = adapter
        if self.record is not None:
            self.record.adapter, self.record.chosen_by = adapter, chosen_by

    def add_tokens(self, n_prompt: int, n_output: int) -> None:
        """Count the tokens of one of the request's calls for text."""
        self.n_prompt_tokens = (self.n_prompt_tokens or 0) + n_prompt
        self.n_output_tokens = (self.n_output_tokens or 0) + n_output

    def failed(self, code: str) -> None:
        """Record the code of the error that ends the answer or its stream."""
        if self.record is not None:
            self.record.error = code


def info_of(scope: AsgiScope) -> RequestInfo:
    info = scope[_KEY]
    assert isinstance(info, RequestInfo)
    return info


def is_anthropic(request: Request) -> bool:
    """Return True for a request of Anthropic's clients, on a path that others use, too."""
    return "anthropic-version" in request.headers


def came_with_key(scope: Mapping[str, object]) -> bool:
    """Return True if ``Auth`` has found a valid API key in the request."""
    info = scope.get(_KEY)
    return isinstance(info, RequestInfo) and info.key_id != ""


@dataclass(frozen=True, slots=True)
class BatchCaller:
    """The API key and tenant of a batch's lines. Only the server itself attaches a caller."""

    key_id: str
    tenant: str

    def attach(self, scope: AsgiScope) -> None:
        scope[_BATCH] = self


def batch_caller_of(scope: AsgiScope) -> BatchCaller | None:
    """Return None for a call from outside."""
    caller = scope.get(_BATCH)
    assert caller is None or isinstance(caller, BatchCaller)
    return caller


def access_of(request: Request) -> AdapterAccess:
    """Return the adapters that the API key of the request may use."""
    return info_of(request.scope).access


def check_sees_all(request: Request) -> None:
    """Raise ApiError (403) if the key is limited to some adapters or to one tenant."""
    if not access_of(request).sees_all:
        raise ApiError(
            403,
            "this route shows all adapters and tenants, and the API key is limited to some; the "
            "key's own calls are at /v1/requests",
            code="live_not_allowed",
        )
