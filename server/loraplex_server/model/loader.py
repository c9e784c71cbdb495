"""Loads from transformers, one at a time in the whole process.

``from_pretrained`` changes process-wide state while it runs: torch's default dtype, and whether
weights are initialised and tied. Two loads at once leave models of mixed dtypes behind, or the
wrong default. So every load goes through ``run_load``, whichever thread it is on. Beside a running
engine load in float32 and convert: the default is float32 then all along, and tensors that other
threads make meanwhile have the dtype they expect.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

import torch

__all__ = ["Lazy", "run_load"]

_T = TypeVar("_T")

# One for the process, as is the state that it protects. Reentrant: a load may consist of others.
_process_lock = threading.RLock()


def run_load(load: Callable[[], _T]) -> _T:
    """Runs ``load`` while no other load runs; raises what it raises.

    The default dtype is afterwards what it was before, whatever ``load`` did.
    """
    with _process_lock:
        default = torch.get_default_dtype()
        try:
            return load()
        finally:
            torch.set_default_dtype(default)


class Lazy(Generic[_T]):
    """A value that is loaded at its first use, once. Thread-safe.

    Callers that come meanwhile wait for that load. A failed load is not kept: its error goes to the
    caller that ran it, and the next caller tries again.
    """

    def __init__(self, load: Callable[[], _T]) -> None:
        self._load = load
        self._loaded: tuple[_T] | None = None

    @property
    def is_loaded(self) -> bool:
        return self._loaded is not None

    def get(self) -> _T:
        """May block for as long as a load takes. Raises what the load raises."""
        loaded = self._loaded
        if loaded is None:
            # The process's lock and no other: one value's load may ask for another value, and two
            # locks would be taken in either order.
            with _process_lock:
                loaded = self._loaded
                if loaded is None:
                    loaded = self._loaded = (run_load(self._load),)
        return loaded[0]
