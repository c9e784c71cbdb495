"""What the HTTP side may ask about adapters on the device; the engine implements it."""

from __future__ import annotations

import asyncio
from typing import Protocol

from loraplex_adapter_store.lease import AdapterLease

__all__ = ["DeviceTier", "DeviceUnloads"]

_MAX_REMEMBERED = 256


class DeviceTier(Protocol):
    """Every call is quick and safe from the event loop."""

    def set_pinned(self, digest: str, pinned: bool) -> None:
        """Keeps an adapter on the device once it is there, or lets it go again."""

    def warm(self, adapter: AdapterLease) -> None:
        """Starts loading an adapter before anybody asks for it."""

    async def unload(self, digest: str) -> int:
        """Frees an idle adapter's place; returns the bytes, 0 if absent or in use.

        Waits for a load that is under way. Raises EngineDead.
        """


class DeviceUnloads:
    """Takes retired adapters off the device, and tells a DELETE how many bytes that freed.

    Event loop only. The store announces a retired digest before its ``delete`` returns, so the
    bytes that a DELETE asks for are those of the unload that is under way already. Without one
    another name keeps the content, and it stays where it is.
    """

    def __init__(self, device: DeviceTier | None) -> None:
        self._device = device
        self._under_way: dict[str, asyncio.Task[int]] = {}

    def retired(self, digest: str) -> None:
        if self._device is None:
            return
        unloading = asyncio.ensure_future(self._device.unload(digest))
        unloading.add_done_callback(_look_at)
        self._under_way[digest] = unloading
        for old in list(self._under_way)[:-_MAX_REMEMBERED]:
            del self._under_way[old]

    async def freed_bytes(self, digest: str) -> int:
        """Raises EngineDead."""
        under_way = self._under_way.pop(digest, None)
        return 0 if under_way is None else await under_way


def _look_at(unloading: asyncio.Task[int]) -> None:
    """Marks an error as seen: ``freed_bytes`` reports it to those who ask."""
    if not unloading.cancelled():
        unloading.exception()
