"""The native kernels of each instruction set, and switching between them for comparisons."""

import ctypes
from typing import Any

from loraplex_kernels.cpu.native import library


def kernel_sets() -> tuple[str, ...]:
    """Return the kernel sets (one for each instruction set) that run here, the fastest first."""
    lib = library()
    return () if lib is None else tuple(name for name, runs in _all_sets(lib) if runs)


def kernel_set() -> str | None:
    """Return the kernel set in use, by default the fastest; None without the library."""
    lib = library()
    return None if lib is None else _text(lib.loraplex_kernel_set)


def use_kernel_set(name: str) -> None:
    """Switch this process to a kernel set. For tests and comparisons."""
    lib = library()
    if lib is None or name not in kernel_sets():
        raise ValueError(f"no native kernels {name!r} run here; known: {kernel_sets()}")
    lib.loraplex_use_kernel_set([known for known, _ in _all_sets(lib)].index(name))


def _all_sets(lib: ctypes.CDLL) -> list[tuple[str, bool]]:
    """Return (name, True if it runs here) of every set that was compiled in."""
    sets: list[tuple[str, bool]] = []
    while (name := _text(lib.loraplex_kernel_set_name, len(sets))) is not None:
        sets.append((name, bool(lib.loraplex_kernel_set_runs_here(len(sets)))))
    return sets


def _text(function: Any, *arguments: int) -> str | None:
    function.restype = ctypes.c_char_p
    text: bytes | None = function(*arguments)
    return None if text is None else text.decode()
