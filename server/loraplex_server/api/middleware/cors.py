"""Pages of other origins. Starlette's middleware, but its refusals are the usual error object."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from loraplex_server.api.errors import ApiError
from loraplex_server.api.orjson_response import ORJSONResponse

__all__ = ["Cors"]

_ABOUT_THE_BODY = frozenset({"content-length", "content-type"})


class Cors(CORSMiddleware):
    def preflight_response(self, request_headers: Headers) -> Response:
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        reason = bytes(answer.body).decode()
        refused = ORJSONResponse.of_error(
            ApiError(answer.status_code, reason, code="origin_not_allowed"), path=""
        )
        kept = {k: v for k, v in answer.headers.items() if k not in _ABOUT_THE_BODY}
        refused.headers.update(kept)
        return refused
