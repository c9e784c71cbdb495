"""API keys. Everything is closed unless listed here, and only ``scope["path"]`` decides.

The path that routing uses is the path that is checked: nothing is rebuilt from the Host header.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable
from dataclasses import replace

from starlette.types import ASGIApp, Receive, Scope, Send

from loraplex_server.api.console_files import is_console
from loraplex_server.api.errors import ApiError
from loraplex_server.api.guide_files import is_guide
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.request_info import BatchCaller, batch_caller_of, info_of
from loraplex_server.api_keys import AdapterAccess, ApiKey
from loraplex_server.api_keys import Scope as KeyScope
from loraplex_server.engine.client import TenantShare
from loraplex_server.settings import HttpConfig

from .rate_limit import Meter, RateLimiter

__all__ = ["Auth"]

_OPEN = frozenset({"/health", "/ready", "/ping"})  # nothing but one word about the server's state
_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_INFERENCE = frozenset(
    {
        *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/route"),
        *("/v1/messages", "/v1/messages/count_tokens", "/v1/responses"),
        *("/tokenize", "/detokenize", "/classify", "/pooling"),
        *("/score", "/v1/score", "/rerank", "/v1/rerank", "/v2/rerank"),
    }
)
_BATCHES = ("/v1/files", "/v1/batches")
_BATCH_WEIGHT = 0.01  # of a tenant's batches beside its other calls
_EVERYTHING = frozenset(KeyScope)


class Auth:
    def __init__(
        self,
        app: ASGIApp,
        config: HttpConfig,
        meter_of: Callable[[ApiKey], Meter] = RateLimiter,
    ) -> None:
        """``meter_of``: what counts for a key that is limited."""
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
        self._open = _OPEN | ({"/metrics"} if config.public_metrics else set())

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
        """Whether the caller is let in, by the head of its request; counts nothing.

        Raises ApiError (429) for a key that may ask again later.
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
            if not self._writes_open:  # anybody may ask: what tenants have had here is not theirs
                info.access = AdapterAccess(tenant="")
        else:
            self._check_open_write()
            info.scopes, info.may_change = _EVERYTHING, True
        if batch_caller_of(scope) is not None:
            share = info.share
            info.share = replace(share, tenant=f"batch:{share.tenant}", weight=_BATCH_WEIGHT)

    def _key_of(self, scope: Scope) -> ApiKey:
        """Compares with every key in constant time, so that time tells nothing."""
        if (batch := batch_caller_of(scope)) is not None:
            return self._key_of_batch(batch)
        given = hashlib.sha256(_secret(scope)).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, given):
                found = key
        if found is None:
            raise ApiError(
                401,
                "no valid API key: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return found

    def _key_of_batch(self, batch: BatchCaller) -> ApiKey:
        for key in self._keys:
            if (key.id, key.tenant) == (batch.key_id, batch.tenant):
                return key
        raise ApiError(
            401, "the API key that made this batch is not valid any more", code="invalid_api_key"
        )

    @staticmethod
    def _is_change(needed: KeyScope, path: str) -> bool:
        """Whether a server without keys has to be closed to others for it."""
        return needed is KeyScope.ADMIN or path.startswith(_BATCHES)

    def _check_open_write(self) -> None:
        if not self._writes_open:
            raise ApiError(
                403,
                "adapters cannot be changed off loopback without an API key, nor files and batches "
                "used; start with --api-key",
                code="writes_disabled",
            )


def _needed_scope(path: str, method: str) -> KeyScope:
    if path == "/metrics" and method in _READS:
        return KeyScope.METRICS
    own = (*_BATCHES, "/v1/responses/")  # each tenant's own
    infers = path in _INFERENCE or path.startswith(own)
    return KeyScope.INFER if method in _READS or infers else KeyScope.ADMIN


def _secret(scope: Scope) -> bytes:
    """A bearer token, or what clients of Anthropic send instead."""
    if not (given := _header(scope, b"authorization")):
        return _header(scope, b"x-api-key").strip()
    kind, _, secret = given.partition(b" ")
    return secret.strip() if kind.lower() == b"bearer" else b""


def _header(scope: Scope, wanted: bytes) -> bytes:
    for name, value in scope["headers"]:
        if name == wanted:
            return bytes(value)
    return b""
