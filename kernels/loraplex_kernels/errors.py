"""Errors of this package.

KernelsError
├── BadFactors         factors that do not fit the target they are given for
├── KernelUnavailable  a library of kernels that is not here
└── PoolFull           the pool has no room; says how much was needed and how much is free
"""

from __future__ import annotations

__all__ = ["BadFactors", "KernelUnavailable", "KernelsError", "PoolFull"]


class KernelsError(Exception):
    """Anything this package refuses."""


class BadFactors(KernelsError, ValueError):
    """Factors whose target, shape or completeness is wrong."""


class KernelUnavailable(KernelsError):
    """A library of kernels is not installed here, or does not work."""


class PoolFull(KernelsError):
    """No room for an adapter. ``needed_bytes`` and ``free_bytes`` say how much is missing."""

    def __init__(self, needed_bytes: int, free_bytes: int, *, n_slots: int, free_slots: int):
        super().__init__(
            f"the adapter pool needs {needed_bytes} bytes in {n_slots} slots, and has"
            f" {free_bytes} bytes in {free_slots} slots free; evict an adapter or enlarge it"
        )
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes
        self.n_slots = n_slots
        self.free_slots = free_slots
