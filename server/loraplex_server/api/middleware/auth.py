"""Checks API keys. Every path needs a key unless it is listed here.

The checked path is ``scope["path"]``, which routing uses too. The Host header is not used.
"""

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import replace

from starlette.types import ASGIApp, Receive, Scope, Send

from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.request_info import BatchCaller, batch_caller_of, info_of
from loraplex_server.api.static_pages import is_console, is_guide
from loraplex_server.engine.requests.client import TenantShare
from loraplex_server.errors import ApiError
from loraplex_server.settings.api_keys import AdapterAccess, ApiKey
from loraplex_server.settings.api_keys import Scope as KeyScope
from loraplex_server.settings.config import HttpConfig

from .rate_limit import Meter

PROBES = frozenset({"/health", "/ready", "/ping"})  # need no key
_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_INFERENCE = frozenset(
    {
        *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/route"),
        *("/v1/messages", "/v1/messages/count_tokens", "/v1/responses"),
        *("/tokenize", "/detokenize", "/classify", "/pooling"),
        *("/", "/generate", "/generate_stream", "/info"),  # of TGI
        *("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
    }
) | {
    f"/api/v1/{path}"  # Tinker's API: what sampling clients send
    for path in (
        *("client/config", "client/dynamic_config", "telemetry", "create_session"),
        *("session_heartbeat", "create_sampling_session", "join_sampling_session", "asample"),
        *("retrieve_future", "cancel_future", "weights_info"),
    )
}
_BATCHES = ("/v1/files", "/v1/batches")
_OWN = (*_BATCHES, "/v1/fine_tuning")  # resources of each tenant, on loopback also without keys
_BATCH_WEIGHT = 0.01  # weight of a tenant's batches relative to its other calls
_EVERYTHING = frozenset(KeyScope)


class Auth:
    """Finds the API key of each request and checks its scope and its rate limit."""

    def __init__(
        self,
        app: ASGIApp,
        config: HttpConfig,
        meter_of: Callable[[ApiKey], Meter] = Meter,
    ) -> None:
        """``meter_of`` makes the meter of a key with rate limits."""
        self._app = app
        self._keys = config.api_keys
        self._meters = {
            key.id: meter_of(key)
            for key in config.api_keys
            if key.requests_per_minute or key.tokens_per_minute
        }
        self._shares = {
            key.tenant: TenantShare(
                key.tenant, key.weight or 1.0, key.max_running or config.max_running, key.max_queued
            )
            for key in config.api_keys
        }
        self._writes_open = config.writes_open
        self._open = PROBES | ({"/metrics"} if config.public_metrics else set())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                await self._check(scope)
            except ApiError as error:
                await ORJSONResponse.of_error(error, scope["path"])(scope, receive, send)
                return
        elif scope["type"] != "lifespan":  # no websockets here
            return
        await self._app(scope, receive, send)

    async def may_send_body(self, scope: Scope) -> bool:
        """Check the head of a request before its body is read. Counts nothing.

        Raises ApiError (429) if the key's rate limit is exceeded.
        """
        needed = _needed_scope(scope["path"], scope["method"])
        if not self._keys:
            return self._writes_open or not self._is_change(needed, scope["path"])
        try:
            key = self._key_of(scope)
        except ApiError:
            return False
        if needed not in key.scopes:
            return False
        if (meter := self._meters.get(key.id)) is not None:
            await meter.check_request()
        return True

    async def _check(self, scope: Scope) -> None:
        path, method = scope["path"], scope["method"]
        if method in _READS and (path in self._open or is_console(path) or is_guide(path)):
            return
        info = info_of(scope)
        needed = _needed_scope(path, method)
        if self._keys:
            key = self._key_of(scope)
            info.key_id, info.tenant = key.id, key.tenant
            info.scopes, info.access = key.scopes, key.access
            info.may_change = KeyScope.ADMIN in key.scopes
            info.meter, info.share = self._meters.get(key.id), self._shares[key.tenant]
            if needed not in key.scopes:
                raise ApiError(
                    403, f"this API key lacks the scope {needed.value!r}", code="missing_scope"
                )
            if info.meter is not None and needed is not KeyScope.METRICS:
                await info.meter.take_request()
        elif not self._is_change(needed, path):
            info.may_change = self._writes_open
            info.scopes = frozenset({KeyScope.INFER})
            if not self._writes_open:  # callers without keys do not see the adapters of tenants
                info.access = AdapterAccess(tenant="")
        else:
            self._check_open_write()
            info.scopes, info.may_change = _EVERYTHING, True
        if batch_caller_of(scope) is not None:
            share = info.share
            info.share = replace(share, tenant=f"batch:{share.tenant}", weight=_BATCH_WEIGHT)

    def _key_of(self, scope: Scope) -> ApiKey:
        """Compare with every key in constant time, against timing attacks."""
        if (batch := batch_caller_of(scope)) is not None:
            return self._key_of_batch(batch)
        digest = hashlib.sha256(_secret(scope)).digest()
        match = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                match = key
        if match is None:
            raise ApiError(
                401,
                "no valid API key: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer", "connection": "close"},
            )
        return match

    def _key_of_batch(self, batch: BatchCaller) -> ApiKey:
        for key in self._keys:
            if (key.id, key.tenant) == (batch.key_id, batch.tenant):
                return key
        raise ApiError(
            401, "the API key that made this batch is no longer valid", code="invalid_api_key"
        )

    @staticmethod
    def _is_change(needed: KeyScope, path: str) -> bool:
        """Return True for requests that a server without keys accepts on loopback only."""
        return needed is KeyScope.ADMIN or path.startswith(_OWN)

    def _check_open_write(self) -> None:
        if not self._writes_open:
            raise ApiError(
                403,
                "without an API key, adapters, files and jobs can be changed on loopback only; "
                "start with --api-key",
                code="writes_disabled",
            )


def _needed_scope(path: str, method: str) -> KeyScope:
    if path == "/metrics" and method in _READS:
        return KeyScope.METRICS
    own = (*_BATCHES, "/v1/responses/", "/api/v1/sessions/")  # resources of each tenant
    infers = path in _INFERENCE or path.startswith(own)
    return KeyScope.INFER if method in _READS or infers else KeyScope.ADMIN


def _secret(scope: Scope) -> bytes:
    """Return the bearer token, or the ``x-api-key`` of Anthropic's clients."""
    if not (value := _header(scope, b"authorization")):
        return _header(scope, b"x-api-key").strip()
    kind, _, secret = value.partition(b" ")
    return secret.strip() if kind.lower() == b"bearer" else b""


def _header(scope: Scope, searched: bytes) -> bytes:
    for name, value in scope["headers"]:
        if name == searched:
            return bytes(value)
    return b""
