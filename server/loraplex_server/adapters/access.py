"""Which adapters a key may use. It learns nothing of the others.

Whether an adapter exists is never looked up before it is known to be allowed. A name means the
tenant's own adapter, else the one that the operator shares.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from concurrent.futures import Executor

from fastapi import Request

from loraplex_adapter_store.names import check_name
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.api.errors import ApiError
from loraplex_server.api.request_info import info_of
from loraplex_server.api_keys import GENERATED, AdapterAccess

__all__ = [
    "access_of",
    "check_allowed",
    "check_owned",
    "check_sees_all",
    "follow_names",
    "name_to_write",
    "own_name",
    "stored_name",
]


def access_of(request: Request) -> AdapterAccess:
    return info_of(request.scope).access


def check_allowed(access: AdapterAccess, name: str, *, param: str | None) -> None:
    """Raises ApiError (403), the same for an adapter that exists and one that does not.

    ``name``: as the client says it.
    """
    if not access.allows(access.own(name)) or (access.tenant is not None and ":" in name):
        raise ApiError(
            403,
            f"this API key may not use the adapter {name[:128]!r}",
            code="adapter_not_allowed",
            param=param,
        )


def check_owned(access: AdapterAccess, name: str, *, param: str | None = "name") -> None:
    """``name``: in the store. Raises ApiError (403) for one that the operator shares."""
    if not access.owns(name):
        raise ApiError(
            403,
            f"the adapter {name!r} is shared by the operator, who alone may change it and see its "
            "load; take another name for an adapter of your own",
            code="adapter_shared",
            param=param,
        )


def check_sees_all(request: Request) -> None:
    """Raises ApiError (403) for keys that are limited to some adapters or to a tenant's."""
    if not access_of(request).sees_all:
        raise ApiError(
            403,
            "this tells of all adapters and tenants, and the API key is limited to some; its own "
            "calls are at /v1/requests",
            code="live_not_allowed",
        )


async def follow_names(
    store: AdapterStore, pool: Executor, access: AdapterAccess, names: Iterable[str]
) -> None:
    """Brings what ``stored_name`` looks at up to date with the catalogue, off the event loop.

    The names are allowed ones. Raises CatalogueUnavailable.
    """
    if not store.is_shared or access.tenant is None:  # then a name means itself
        return
    wanted = {stored for name in names for stored in (name, access.own(name))}
    stale = [name for name in wanted if not store.is_fresh(name)]
    if stale:
        await asyncio.get_running_loop().run_in_executor(pool, store.follow, stale)


def stored_name(store: AdapterStore, access: AdapterAccess, name: str, *, param: str | None) -> str:
    """What the store calls the adapter that ``name`` means; it need not exist.

    Raises ApiError (403).
    """
    check_allowed(access, name, param=param)
    own = access.own(name)
    shared = own != name and access.allows(name) and store.has_name(name)
    return name if shared and not store.has_name(own) else own


def own_name(store: AdapterStore, access: AdapterAccess, name: str, *, param: str | None) -> str:
    """``stored_name`` of what the key may change. Raises ApiError (403)."""
    stored = stored_name(store, access, name, param=param)
    check_owned(access, stored, param=param)
    return stored


def name_to_write(
    store: AdapterStore, access: AdapterAccess, name: str, *, param: str | None
) -> str:
    """``own_name`` for new weights. Raises ApiError (403), InvalidName and QuotaExceeded."""
    if name.rpartition(":")[2].startswith(GENERATED):
        raise ApiError(
            403,
            f"names under {GENERATED} are chosen by the server; take another one than "
            f"{name[:128]!r}",
            code="name_reserved",
            param=param,
        )
    own = own_name(store, access, name, param=param)
    check_name(name)  # before anything is fetched, made or trained
    store.check_quota(own, access.quota)
    return own
