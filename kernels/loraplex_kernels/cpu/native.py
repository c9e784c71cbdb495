"""Loads the native kernels: a shared library bound to the OpenMP runtime that torch uses."""

import ctypes
import functools
import logging
import threading
from pathlib import Path

import torch

from .structs import layout_faults

_ABI = 13
_switched_off = threading.Event()
_OPENMP_RUNTIMES = ("libgomp", "libiomp5", "libomp")

logger = logging.getLogger(__name__)


def available() -> bool:
    """Return True if the native kernels can run here; else the PyTorch references run."""
    return library() is not None


def prefers_coded_pages() -> bool:
    """Return True if the kernels in use read exponent-coded factors faster than plain ones."""
    lib = library()
    return lib is not None and bool(lib.loraplex_prefers_coded_pages())


def prefers_coded_weights() -> bool:
    """Return True if the kernels in use read exponent-coded base weights faster."""
    lib = library()
    return lib is not None and bool(lib.loraplex_prefers_coded_weights())


def use_references() -> None:
    """Switch this process to the PyTorch references.

    Call this before weights are packed: only native code can read its own layout.
    """
    logger.info("PyTorch references instead of native CPU kernels")
    _switched_off.set()
    library.cache_clear()


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the loaded library, or None after logging the reason once."""
    if _switched_off.is_set():
        return None
    folder = Path(__file__).parent
    libraries = sorted(folder.glob("_native*.so"))
    if not libraries:
        logger.warning("native CPU kernels are not built (no C++ compiler?); using PyTorch")
        return None
    try:
        _share_openmp_runtime()
        lib = ctypes.CDLL(str(libraries[0]))
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


def _share_openmp_runtime() -> None:
    """Make torch's OpenMP runtime resolve our library's symbols.

    Our library uses OpenMP and links to no runtime. The threads of a second runtime would compete
    with torch's for the same cores. So the runtime that torch has loaded (bundled in its wheels, or
    the system's) is opened again with global symbols. Intel's and LLVM's runtimes have GCC's entry
    points, too.
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
    # If another package loaded a second runtime, torch's own comes first.
    root = str(Path(torch.__file__).parent.parent)
    return min(candidates, key=lambda path: not path.startswith(root), default=None)
