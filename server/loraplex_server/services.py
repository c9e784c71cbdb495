"""Starts and stops an application's background services."""

import asyncio
import contextlib
import logging
from collections.abc import Callable

from fastapi import FastAPI

from loraplex_server.adapters.device_tier import DevicePins
from loraplex_server.api.state import AppState

from .errors import unavailable

_LAST_EVENTS_S = 1.0  # time for the engine's last events to reach the streams
_log = logging.getLogger(__name__)


def parts_of(app: FastAPI) -> AppState:
    services = app.state.parts
    assert isinstance(services, AppState)
    return services


async def start_services(services: AppState) -> asyncio.Task[None]:
    """Start the services on the running event loop. The returned task ends with the loop."""
    device_follows(services)
    watching = asyncio.create_task(services.metrics.loop_lag.watch())
    await services.batches.resume()
    if services.fine_tuning is not None:
        await services.fine_tuning.start()
    services.grammars.start()
    return watching


def device_follows(services: AppState) -> None:
    """Pin adapters on the device when their names are pinned, and unload deleted adapters.

    Called on the event loop, which hears of a change before the store's call returns.
    """
    loop = asyncio.get_running_loop()
    if services.device is not None:
        pins = DevicePins(services.device)
        services.store.on_pinned(lambda digests: tell(loop, lambda: pins(digests)))
    services.store.on_retired(lambda digest: tell(loop, lambda: services.unloads.retired(digest)))


async def stop_services(services: AppState, drain_timeout_s: float) -> None:
    """Refuse new requests and wait for the running ones. Late ones end with an error event."""
    await services.batches.close()
    await services.sessions.close()
    if services.fine_tuning is not None:
        await services.fine_tuning.close()
    services.lifecycle.is_draining = True
    n_live = len(services.live)
    if n_live:
        _log.info("draining: %d requests may finish within %g s", n_live, drain_timeout_s)
    if not await services.engine.drain(drain_timeout_s):
        _log.warning("drain timeout: the remaining requests end with an error event")
    # The engine has ended every request. Streams that miss its last event get one from here.
    deadline = asyncio.get_running_loop().time() + _LAST_EVENTS_S
    while services.live and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.01)
    for call in list(services.live):
        call.fail(unavailable("the server went down", "server_draining"))
    await services.grammars.close()
    await services.file_checks.close()


def tell(loop: asyncio.AbstractEventLoop, message: Callable[[], None]) -> None:
    """Run ``message`` on the loop. Any thread. Does nothing once the loop is closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(message)
