"""Loads the native kernels: one shared library, bound to the OpenMP runtime that torch uses."""

from __future__ import annotations

import ctypes
import enum
import functools
import logging
import threading
from pathlib import Path

import torch

__all__ = ["Isa", "available", "isa", "library", "limit_isa", "use_references"]

_ABI = 9
_switched_off = threading.Event()
_OPENMP_RUNTIMES = ("libgomp", "libiomp5", "libomp")

logger = logging.getLogger(__name__)


class Isa(enum.IntEnum):
    """Instruction sets the library holds code for; it picks the best one of the processor."""

    PORTABLE = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3


def available() -> bool:
    """Whether the native kernels can run here. False: the PyTorch references are used."""
    return library() is not None


def isa() -> Isa | None:
    """The instruction set in use; None without the library."""
    lib = library()
    return None if lib is None else Isa(lib.loraplex_isa())


def limit_isa(best: Isa) -> Isa | None:
    """Uses nothing better than ``best`` from now on, in this process. For tests and comparisons."""
    lib = library()
    return None if lib is None else Isa(lib.loraplex_limit_isa(int(best)))


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
    return lib


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
