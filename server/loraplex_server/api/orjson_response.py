"""JSON answers, encoded by orjson, and errors in the form that Anthropic's clients read."""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from starlette.responses import Response

from loraplex_server.errors import ApiError

# status → Anthropic's word for the kind of error
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


class ORJSONResponse(Response):
    """A JSON answer."""

    media_type = "application/json"

    def __init__(
        self, content: object, *, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """``content``: JSON-ready values, or bytes of JSON."""
        super().__init__(content, status_code=status, headers=headers)

    def render(self, content: object) -> bytes:
        return content if isinstance(content, bytes) else orjson.dumps(content)

    @staticmethod
    def of_error(error: ApiError, path: str) -> ORJSONResponse:
        """Return the error object in OpenAI's form, or in Anthropic's for its paths."""
        is_anthropic = path == "/v1/messages" or path.startswith("/v1/messages/")
        body = anthropic_error(error) if is_anthropic else error.body()
        return ORJSONResponse(body, status=error.status, headers=error.headers)


def anthropic_error(error: ApiError) -> bytes:
    """Return the JSON object, which is also the payload of an error event."""
    return orjson.dumps(
        {
            "type": "error",
            "error": {
                "type": _TYPES.get(error.status, "invalid_request_error"),
                "message": error.message,
                "param": error.param,
                "code": error.code,
                **error.details,
            },
        }
    )
