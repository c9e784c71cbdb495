"""The folder of an upload, whose bytes count against ``max_bytes`` while they arrive."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi.concurrency import contextmanager_in_threadpool

from loraplex_adapter_store.errors import QuotaExceeded
from loraplex_server.adapters.adding.arriving_bytes import Count
from loraplex_server.errors import from_store
from loraplex_server.settings.api_keys import AdapterAccess

from .state import AppState, in_store_thread


@asynccontextmanager
async def upload_folder(
    state: AppState, access: AdapterAccess, name: str | None = None
) -> AsyncIterator[tuple[Path, Count]]:
    """Yield an empty folder on the store's disk, and a function that counts arriving bytes.

    The function raises ApiError (403) once the tenant's uploads and what it stores, without the
    adapter ``name``, exceed its ``max_bytes``. The folder is deleted at the end.
    """
    check = await check_of_bytes(state, access, name)
    with state.arriving.upload(access.tenant or "", check) as count:
        async with contextmanager_in_threadpool(state.store.upload_folder()) as folder:
            yield folder, count


async def check_of_bytes(state: AppState, access: AdapterAccess, name: str | None = None) -> Count:
    """Return a function that raises ApiError (403) for more bytes than ``max_bytes`` leaves."""
    quota, tenant = access.quota, access.tenant
    if quota.max_bytes is None or tenant is None:
        return lambda n_bytes: None
    n_stored = await in_store_thread(
        state, lambda: state.store.n_bytes_beside(tenant, name), access
    )

    def check(n_bytes: int) -> None:
        try:
            quota.check_bytes(n_stored + n_bytes)
        except QuotaExceeded as error:
            raise from_store(error) from error

    return check
