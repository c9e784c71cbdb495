"""Errors on the routes of Anthropic's API, in the form that its clients read.

``{"type": "error", "error": {"type", "message"}}``, and inside it ``param`` and ``code`` as
everywhere else on this server.
"""

from __future__ import annotations

import orjson

from .errors import ApiError

__all__ = ["anthropic_error", "speaks_anthropic"]

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


def speaks_anthropic(path: str) -> bool:
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def anthropic_error(error: ApiError) -> bytes:
    """The JSON object, also the payload of an error event."""
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
