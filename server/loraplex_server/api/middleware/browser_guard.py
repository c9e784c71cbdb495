"""Protects a server on this machine from foreign web pages.

A server without keys listens on loopback, where every browser of the machine can reach it. A page
can send requests under its own ``Origin``. By DNS rebinding a page can also read the answers: its
own host name resolves to 127.0.0.1, so ``Host`` is the page's. Both are refused first. With keys, a
page would need a key, so only the security headers are added.
"""

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.api.static_pages import is_console, is_guide
from loraplex_server.errors import ApiError
from loraplex_server.settings.config import HttpConfig, is_loopback

_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}
# The console and the guide have no inline script or style, nothing of other hosts, and no frame.
# Images within a page are the icons of the guide and those of a prompt.
_PAGE_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"  # noqa: E501  one header value
_DOCS = ("/docs", "/static-offline-docs/")  # may run its own scripts
_DOCS_POLICY = "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"  # noqa: E501  one header value
_BODY_HEADERS = frozenset({"content-length", "content-type"})


class BrowserGuard:
    """Refuses foreign pages and adds the security headers."""

    def __init__(self, app: ASGIApp, config: HttpConfig) -> None:
        self._app = app
        self._checks = config.writes_open  # no keys, loopback
        self._origins = frozenset(config.cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_page = scope["path"].startswith(_DOCS)

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                if is_page:
                    headers["content-security-policy"] = _DOCS_POLICY
                elif is_console(scope["path"]) or is_guide(scope["path"]):
                    headers["content-security-policy"] = _PAGE_POLICY
            await send(message)

        if self._checks:
            try:
                self._check(Headers(scope=scope), scope["method"])
            except ApiError as error:
                refusal = ORJSONResponse.of_error(error, scope["path"])
                await refusal(scope, receive, send_with_headers)
                return
        await self._app(scope, receive, send_with_headers)

    def _check(self, headers: Headers, method: str) -> None:
        """Raises ApiError (403)."""
        host = headers.get("host", "").lower()
        if not is_loopback(_name(host)):
            raise ApiError(
                403,
                f"without an API key this server answers only to loopback names, not to "
                f"{host[:100]!r}",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is None or method in _READS or origin in self._origins:
            return
        if origin.lower().partition("://")[2] != host:
            raise ApiError(
                403,
                f"pages of {origin[:100]!r} may not use this server; the operator can allow them "
                "with --cors-origin",
                code="origin_not_allowed",
            )


def _name(host: str) -> str:
    return host if host.endswith("]") else host.rsplit(":", 1)[0]


class Cors(CORSMiddleware):
    """Answers refused preflights with the error object."""

    def preflight_response(self, request_headers: Headers) -> Response:
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        reason = bytes(answer.body).decode()
        refused = ORJSONResponse.of_error(
            ApiError(answer.status_code, reason, code="origin_not_allowed"), path=""
        )
        headers = {k: v for k, v in answer.headers.items() if k not in _BODY_HEADERS}
        refused.headers.update(headers)
        return refused
