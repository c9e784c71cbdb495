"""The engine's interface to adapters on the device; the pins and unloads that follow the store."""

import asyncio
from typing import Protocol

from loraplex_adapter_store.leasing import AdapterLease

_MAX_REMEMBERED = 256


class DeviceTier(Protocol):
    """The adapters on the device. Calls are quick enough for the event loop."""

    def set_pinned(self, digest: str, pinned: bool) -> None:
        """Pin or unpin an adapter. A pinned adapter stays on the device once it is loaded."""

    def warm(self, adapter: AdapterLease) -> None:
        """Start to load an adapter before a request needs it."""

    async def unload(self, digest: str) -> int:
        """Free the memory of an idle adapter. Return the bytes, 0 if it is absent or in use.

        Waits for a running load. Raises EngineDead.
        """


class DevicePins:
    """Applies the pins of names to the device: a listener of ``on_pinned``. Event loop only."""

    def __init__(self, device: DeviceTier) -> None:
        self._device = device
        self._pinned: frozenset[str] = frozenset()

    def __call__(self, digests: frozenset[str]) -> None:
        for digest in digests - self._pinned:
            self._device.set_pinned(digest, True)
        for digest in self._pinned - digests:
            self._device.set_pinned(digest, False)
        self._pinned = digests


class DeviceUnloads:
    """Unloads deleted adapters from the device. Event loop only.

    The store announces a deleted digest before its ``delete`` returns, so the unload has started
    when a DELETE asks for the freed bytes. There is no unload if another name has the content.
    """

    def __init__(self, device: DeviceTier | None) -> None:
        self._device = device
        self._running: dict[str, asyncio.Task[int]] = {}

    def retired(self, digest: str) -> None:
        if self._device is None:
            return
        unloading = asyncio.ensure_future(self._device.unload(digest))
        unloading.add_done_callback(_mark_seen)
        self._running[digest] = unloading
        for old in list(self._running)[:-_MAX_REMEMBERED]:
            del self._running[old]

    async def freed_bytes(self, digest: str) -> int:
        """Wait for the unload and return the freed bytes. Raises EngineDead."""
        unload = self._running.pop(digest, None)
        return 0 if unload is None else await unload


def _mark_seen(unloading: asyncio.Task[int]) -> None:
    """Mark an error as retrieved. ``freed_bytes`` raises the error to its caller."""
    if not unloading.cancelled():
        unloading.exception()
