"""How a store uses its catalogue."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CatalogueLimits"]


@dataclass(frozen=True, slots=True)
class CatalogueLimits:
    refresh_s: float = 1.0  # how long a name is answered from memory before it is asked for again
    stale_s: float = 300.0  # the same while the object store is down; then the name is unavailable
    poll_s: float = 10.0  # between looks for what others changed in names that nobody asks for
    disk_bytes: int = 64 << 30  # of contents on this server's disk
