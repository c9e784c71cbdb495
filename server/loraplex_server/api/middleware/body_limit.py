"""Limits the size of bodies while they arrive, before they are parsed."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loraplex_server.api.orjson_response import ORJSONResponse
from loraplex_server.errors import ApiError
from loraplex_server.settings.config import HttpConfig

_UPLOADS = "/v1/adapters/"
_FILES = "/v1/files"


class BodyLimit:
    """Answers 413 for a body above the limit of its route."""

    def __init__(self, app: ASGIApp, config: HttpConfig) -> None:
        self._app = app
        self._max_body = config.max_body_bytes
        self._max_upload = config.max_upload_bytes
        self._max_file = config.max_batch_file_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._max_body
        if scope["method"] == "PUT" and scope["path"].startswith(_UPLOADS) and _is_form(scope):
            limit = self._max_upload  # files of a form go to disk, other bodies to memory
        elif scope["method"] == "POST" and scope["path"] == _FILES:
            limit = self._max_file
        if _declared(scope) > limit:
            await ORJSONResponse.of_error(_too_large(limit), scope["path"])(scope, receive, send)
            return
        n_received = 0

        async def counting_receive() -> Message:
            nonlocal n_received
            message = await receive()
            n_received += len(message.get("body", b""))
            if n_received > limit:
                raise _too_large(limit)
            return message

        await self._app(scope, counting_receive, send)


def _is_form(scope: Scope) -> bool:
    kind = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    return bool(kind.partition(b";")[0].strip().lower() == b"multipart/form-data")


def _declared(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0


def _too_large(limit: int) -> ApiError:
    # The rest of the body stays unread, so the connection must close.
    return ApiError(
        413,
        f"the body is larger than the {limit} bytes that this server accepts",
        code="body_too_large",
        headers={"connection": "close"},
    )
