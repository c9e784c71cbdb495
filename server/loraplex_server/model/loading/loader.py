"""Loads models from transformers, one at a time in the whole process.

``from_pretrained`` changes process-wide state while it runs: torch's default dtype, and whether
weights are initialised and tied. Two loads at once leave models of mixed dtypes or a wrong default.
So every load goes through ``run_load``, on any thread. Beside a running engine, load in float32 and
convert. Then the default stays float32, and tensors of other threads get the dtype they expect.
"""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import torch

_T = TypeVar("_T")
IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")  # one is enough

# One lock for the process, as is the state that it guards. Reentrant: loads may be nested.
_process_lock = threading.RLock()


def run_load(load: Callable[[], _T]) -> _T:
    """Run ``load`` while no other load runs, and restore the default dtype. Raises its errors."""
    with _process_lock:
        default = torch.get_default_dtype()
        try:
            return load()
        finally:
            torch.set_default_dtype(default)


def has_image_processor(folder: Path) -> bool:
    return any((folder / name).is_file() for name in IMAGE_PROCESSOR_FILES)


class Lazy(Generic[_T]):
    """A value that is loaded once, at its first use. Thread-safe.

    Other callers wait for a running load. A failed load raises in the caller that ran it, and the
    next caller tries again.
    """

    def __init__(self, load: Callable[[], _T]) -> None:
        self._load = load
        self._loaded: tuple[_T] | None = None

    def get(self) -> _T:
        """Return the value, loading it if need be. Raises errors of the load."""
        loaded = self._loaded
        if loaded is None:
            # No lock of its own: one load may need another value, and two locks could deadlock.
            with _process_lock:
                loaded = self._loaded
                if loaded is None:
                    loaded = self._loaded = (run_load(self._load),)
        return loaded[0]
