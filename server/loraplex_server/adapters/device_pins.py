"""Pins of names, told to the device by digest."""

from __future__ import annotations

from .device_tier import DeviceTier

__all__ = ["DevicePins"]


class DevicePins:
    """Event loop only. Gets what a listener of ``AdapterStore.on_pinned`` gets, in its order."""

    def __init__(self, device: DeviceTier) -> None:
        self._device = device
        self._pinned: frozenset[str] = frozenset()

    def __call__(self, digests: frozenset[str]) -> None:
        for digest in digests - self._pinned:
            self._device.set_pinned(digest, True)
        for digest in self._pinned - digests:
            self._device.set_pinned(digest, False)
        self._pinned = digests
