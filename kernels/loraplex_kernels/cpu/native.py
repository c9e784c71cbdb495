"""Loads the native kernels: one shared library, bound to the OpenMP runtime that torch uses."""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from pathlib import Path
from typing import Any

import torch

from .structs import layout_faults

__all__ = [
    "available",
    "kernel_set",
    "kernel_sets",
    "library",
    "prefers_coded_pages",
    "prefers_coded_weights",
    "use_kernel_set",
    "use_references",
]

_ABI = 11
_switched_off = threading.Event()
_OPENMP_RUNTIMES = ("libgomp", "libiomp5", "libomp")

logger = logging.getLogger(__name__)


def available() -> bool:
    """Whether the native kernels can run here. False: the PyTorch references are used."""
    return library() is not None


def kernel_sets() -> tuple[str, ...]:
    """Names of the sets of kernels, one an instruction set, that run here; the best first."""
    lib = library()
    return () if lib is None else tuple(name for name, runs in _all_sets(lib) if runs)


def kernel_set() -> str | None:
    """The set in use, by default the best; None without the library."""
    lib = library()
    return None if lib is None else _text(lib.loraplex_kernel_set)


def use_kernel_set(name: str) -> None:
    """Uses these kernels from now on, in this process. For tests and comparisons."""
    lib = library()
    if lib is None or name not in kernel_sets():
        raise ValueError(f"no native kernels {name!r} run here; known: {kernel_sets()}")
    lib.loraplex_use_kernel_set([found for found, _ in _all_sets(lib)].index(name))


def prefers_coded_pages() -> bool:
    """Whether the kernels in use read exponent-coded factors faster than plain ones."""
    lib = library()
    return lib is not None and bool(lib.loraplex_prefers_coded_pages())


def prefers_coded_weights() -> bool:
    """The same of the base's weights."""
    lib = library()
    return lib is not None and bool(lib.loraplex_prefers_coded_weights())


def use_references() -> None:
    """From now on the PyTorch references run instead, in this process.

    Call it before weights are packed: what native code has laid out, only it can read.
    """
    logger.info("PyTorch references instead of native CPU kernels")
    _switched_off.set()
    library.cache_clear()


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library, or None with the reason in the log (once)."""
    if _switched_off.is_set():
        return None
    folder = Path(__file__).parent
    found = sorted(folder.glob("_native*.so"))
    if not found:
        logger.warning("native CPU kernels are not built (no C++ compiler?); using PyTorch")
        return None
    try:
        _share_openmp_runtime()
        lib = ctypes.CDLL(str(found[0]))
        built = lib.loraplex_abi()
    except (OSError, AttributeError) as error:
        logger.warning("native CPU kernels cannot be loaded (%s); using PyTorch", error)
        return None
    if built != _ABI:
        logger.warning(
            "native CPU kernels have ABI %d, not %d: rebuild; using PyTorch", built, _ABI
        )
        return None
    faults = layout_faults(lib)
    if faults:
        logger.warning("native CPU kernels lay out other structs: %s; using PyTorch", faults)
        return None
    return lib


def _all_sets(lib: ctypes.CDLL) -> list[tuple[str, bool]]:
    """(name, whether it runs here) of every set that was compiled in."""
    sets: list[tuple[str, bool]] = []
    while (name := _text(lib.loraplex_kernel_set_name, len(sets))) is not None:
        sets.append((name, bool(lib.loraplex_kernel_set_runs_here(len(sets)))))
    return sets


def _text(function: Any, *arguments: int) -> str | None:
    function.restype = ctypes.c_char_p
    found: bytes | None = function(*arguments)
    return None if found is None else found.decode()


def _share_openmp_runtime() -> None:
    """Makes torch's OpenMP runtime resolve our library's symbols.

    Our library is compiled for OpenMP and linked to none. A second runtime would have threads of
    its own that spin beside torch's on the same cores; so the one torch has loaded (wheels bundle
    it, other builds use the system's) is opened once more with its symbols made global. Intel's and
    LLVM's runtimes serve GCC's entry points too.
    """
    torch.get_num_threads()
    path = _loaded_openmp_runtime()
    if path is not None:
        ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        return
    for name in ("libgomp.so.1", "libiomp5.so", "libomp.so"):
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return


def _loaded_openmp_runtime() -> str | None:
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    paths = dict.fromkeys(line.split()[-1] for line in maps.splitlines() if "/" in line)
    candidates = [path for path in paths if Path(path).name.startswith(_OPENMP_RUNTIMES)]
    # Where several are loaded (another package brought its own), torch's own comes first.
    root = str(Path(torch.__file__).parent.parent)
    return min(candidates, key=lambda path: not path.startswith(root), default=None)
