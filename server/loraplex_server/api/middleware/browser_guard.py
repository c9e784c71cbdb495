"""What a web page of somebody else may not do with a server on this machine.

A server without keys listens on loopback, where every browser of the machine can reach it. A page
can send it requests (under its own ``Origin``), and can give its own name the address 127.0.0.1 to
read the answers too (DNS rebinding: the ``Host`` is then the page's). Both are refused before
anything is looked at. With keys a page would need one, so only the headers are added.
"""

from __future__ import annotations

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex_server.api.console_files import is_console
from loraplex_server.api.errors import ApiError
from loraplex_server.api.guide_files import is_guide
from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.settings import HttpConfig, is_loopback

__all__ = ["BrowserGuard"]

_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}
# No inline script or style, nothing of other hosts, and no frame around it.
_CONSOLE_POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"  # noqa: E501  one header value
# The same for the guide, whose icons stand in its style sheet.
_GUIDE_POLICY = _CONSOLE_POLICY.replace("img-src 'self'", "img-src 'self' data:")
_DOCS = ("/docs", "/static-offline-docs/")  # a page: it may run its own scripts
_DOCS_POLICY = "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; frame-ancestors 'none'"  # noqa: E501  one header value


class BrowserGuard:
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
                elif is_console(scope["path"]):
                    headers["content-security-policy"] = _CONSOLE_POLICY
                elif is_guide(scope["path"]):
                    headers["content-security-policy"] = _GUIDE_POLICY
            await send(message)

        if self._checks:
            try:
                self._check(Headers(scope=scope), scope["method"])
            except ApiError as error:
                told = ORJSONResponse.of_error(error, scope["path"])
                await told(scope, receive, send_with_headers)
                return
        await self._app(scope, receive, send_with_headers)

    def _check(self, headers: Headers, method: str) -> None:
        """Raises ApiError (403)."""
        host = headers.get("host", "").lower()
        if not is_loopback(_name(host)):
            raise ApiError(
                403,
                f"without an API key this server answers to its loopback names alone, not to "
                f"{host[:100]!r}",
                code="host_not_allowed",
            )
        origin = headers.get("origin")
        if origin is None or method in _READS or origin in self._origins:
            return
        if origin.lower().partition("://")[2] != host:
            raise ApiError(
                403,
                f"pages of {origin[:100]!r} may not use this server; the operator allows it with "
                "--cors-origin",
                code="origin_not_allowed",
            )


def _name(host: str) -> str:
    return host if host.endswith("]") else host.rsplit(":", 1)[0]
