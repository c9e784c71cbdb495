"""Checks which adapters an API key may use. Answers do not reveal other adapters.

The check comes before any look-up of the adapter. A name means the tenant's own adapter, or else
the adapter that the operator shares.
"""

import asyncio
from collections.abc import Iterable
from functools import partial

from loraplex_adapter_store.names.name_syntax import FINE_TUNED, check_name, local_name
from loraplex_adapter_store.store import AdapterStore
from loraplex_server.errors import ApiError
from loraplex_server.settings.api_keys import GENERATED, AdapterAccess
from loraplex_server.tenant_shares import TenantThreads


def check_allowed(access: AdapterAccess, name: str, *, param: str | None) -> None:
    """Raises ApiError (403), even if no such adapter exists. ``name`` is the client's name."""
    if not access.allows(access.own(name)) or (
        access.tenant is not None and local_name(name) != name
    ):
        raise ApiError(
            403,
            f"this API key may not use the adapter {name[:128]!r}",
            code="adapter_not_allowed",
            param=param,
        )


def check_owned(access: AdapterAccess, name: str, *, param: str | None = "name") -> None:
    """Raises ApiError (403) if the operator shares the adapter. ``name`` is the stored name."""
    if not access.owns(name):
        raise ApiError(
            403,
            f"the adapter {name!r} is shared by the operator, who alone may change it and see its "
            "load; take another name for an adapter of your own",
            code="adapter_shared",
            param=param,
        )


async def follow_names(
    store: AdapterStore, pool: TenantThreads, access: AdapterAccess, names: Iterable[str]
) -> None:
    """Wait for names that are being added, and read stale ones from the catalogue in ``pool``.

    To be called before ``stored_name``. The key may use the names. Raises CatalogueUnavailable.
    """
    names = tuple(names)
    await until_added(store, access, names)
    if not store.is_shared or access.tenant is None:  # the stored name is the name
        return
    candidates = {stored for name in names for stored in (name, access.own(name))}
    stale = [name for name in candidates if not store.is_fresh(name)]
    if stale:
        await pool.run(access.tenant, partial(store.follow, stale))


async def until_added(store: AdapterStore, access: AdapterAccess, names: Iterable[str]) -> None:
    """Wait for those of the names that the server is adding since its start."""
    if not len(store.expected):
        return
    candidates = {stored for name in names for stored in (name, access.own(name))}
    for arrival in store.expected.arrivals(candidates):
        await asyncio.wrap_future(arrival)


def stored_name(store: AdapterStore, access: AdapterAccess, name: str, *, param: str | None) -> str:
    """Return the stored name of an adapter, which need not exist. Raises ApiError (403)."""
    check_allowed(access, name, param=param)
    own = access.own(name)
    shared = own != name and access.allows(name) and store.has_name(name)
    return name if shared and not store.has_name(own) else own


def own_name(store: AdapterStore, access: AdapterAccess, name: str, *, param: str | None) -> str:
    """Return the stored name of an adapter that the key may change. Raises ApiError (403)."""
    stored = stored_name(store, access, name, param=param)
    check_owned(access, stored, param=param)
    return stored


def name_to_write(
    store: AdapterStore, access: AdapterAccess, name: str, *, param: str | None
) -> str:
    """Return the stored name for new weights. Raises ApiError (403), InvalidName, QuotaExceeded."""
    if local_name(name).lower().startswith((GENERATED, FINE_TUNED)):
        raise ApiError(
            403,
            f"names under {GENERATED} and {FINE_TUNED} are chosen by the server; take another one "
            f"than {name[:128]!r}",
            code="name_reserved",
            param=param,
        )
    own = own_name(store, access, name, param=param)
    check_name(name)  # before an adapter is fetched, generated or trained
    store.check_quota(own, access.quota)
    return own
