"""Which contents are pinned: host memory keeps them, and whoever listens hears of each change."""

from __future__ import annotations

from collections.abc import Callable

from .host_tier import HostTier
from .name_index import NameIndex

__all__ = ["Pins"]


class Pins:
    """Call it while writing (the store's lock of changes)."""

    def __init__(self, index: NameIndex, tier: HostTier) -> None:
        self._index = index
        self._tier = tier
        self._listeners: tuple[Callable[[frozenset[str]], None], ...] = ()

    def listen(self, listener: Callable[[frozenset[str]], None]) -> None:
        self._listeners = (*self._listeners, listener)
        listener(self._index.pinned_digests())

    def apply(self) -> None:
        """After a change of names: what is pinned stays where it is."""
        digests = self._index.pinned_digests()
        self._tier.pin(digests)
        for listener in self._listeners:
            listener(digests)
