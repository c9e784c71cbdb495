"""An error for a client, as it crosses processes: exceptions with fields do not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from loraplex_server.api.errors import ApiError

__all__ = ["Refused"]


class Refused(NamedTuple):
    status: int
    message: str
    code: str
    param: str | None
    kind: str
    headers: Mapping[str, str]
    details: Mapping[str, object]

    @staticmethod
    def of(error: ApiError) -> Refused:
        return Refused(
            error.status,
            error.message,
            error.code,
            error.param,
            error.kind,
            error.headers,
            error.details,
        )

    def error(self) -> ApiError:
        return ApiError(
            self.status,
            self.message,
            code=self.code,
            param=self.param,
            kind=self.kind,
            headers=self.headers,
            details=self.details,
        )
