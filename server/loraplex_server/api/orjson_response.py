"""JSON answers, encoded by orjson."""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from starlette.responses import Response

from .anthropic_errors import anthropic_error, speaks_anthropic
from .errors import ApiError

__all__ = ["ORJSONResponse"]


class ORJSONResponse(Response):
    media_type = "application/json"

    def __init__(
        self, content: object, *, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> None:
        """``content``: JSON-ready values, or bytes that are JSON already."""
        super().__init__(content, status_code=status, headers=headers)

    def render(self, content: object) -> bytes:
        return content if isinstance(content, bytes) else orjson.dumps(content)

    @staticmethod
    def of_error(error: ApiError, path: str) -> ORJSONResponse:
        """``path``: of the request; some routes speak another API's dialect."""
        body = anthropic_error(error) if speaks_anthropic(path) else error.body()
        return ORJSONResponse(body, status=error.status, headers=error.headers)
