"""The errors of this package.

KernelsError
├── BadFactors         the factors do not fit their target
├── KernelUnavailable  an optional kernel library cannot be used
└── PoolFull           the pool has no room; says how much is needed and how much is free
"""


class KernelsError(Exception):
    """The base class of this package's errors."""


class BadFactors(KernelsError, ValueError):
    """The target, the shape or the completeness of factors is wrong."""


class KernelUnavailable(KernelsError):
    """A kernel library is not installed or cannot be imported."""


class PoolFull(KernelsError):
    """The pool has no room for an adapter. ``needed_bytes`` and ``free_bytes`` say how much."""

    def __init__(self, needed_bytes: int, free_bytes: int, *, n_slots: int, free_slots: int):
        super().__init__(
            f"the adapter pool needs {needed_bytes} bytes in {n_slots} slots, and has"
            f" {free_bytes} bytes in {free_slots} slots free; evict an adapter or enlarge it"
        )
        self.needed_bytes = needed_bytes
        self.free_bytes = free_bytes
        self.n_slots = n_slots
        self.free_slots = free_slots
