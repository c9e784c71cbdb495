"""Which adapters a key with a list may use. It learns nothing of the others.

Whether an adapter exists is never looked up before it is known to be allowed.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from loraplex_server.api.errors import ApiError
from loraplex_server.api.request_info import info_of
from loraplex_server.api_keys import AdapterAccess

__all__ = ["AdapterName", "access_of", "check_allowed"]


def access_of(request: Request) -> AdapterAccess:
    return info_of(request.scope).access


def check_allowed(access: AdapterAccess, name: str, *, param: str | None) -> None:
    """Raises ApiError (403), the same for an adapter that exists and one that does not."""
    if not access.allows(name):
        raise ApiError(
            403,
            f"this API key may not use the adapter {name[:128]!r}",
            code="adapter_not_allowed",
            param=param,
        )


async def _allowed_name(request: Request, name: str) -> str:
    check_allowed(access_of(request), name, param="name")
    return name


AdapterName = Annotated[str, Depends(_allowed_name)]  # the ``{name}`` of a route's path
