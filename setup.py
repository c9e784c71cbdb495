"""Builds the native CPU kernels; everything else is declared in pyproject.toml.

One shared library with a plain C interface, no torch and no Python headers. ``optional``: without a
compiler the install succeeds and the PyTorch references run instead (the log says so). The library
holds code for every instruction set and picks one at run time, so no ``-march`` here. OpenMP is
compiled in but not linked: ``cpu/native.py`` binds it to the runtime that torch has loaded, so that
both share one pool of threads.
"""

import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel

CSRC = "kernels/loraplex_kernels/cpu/csrc"
SOURCES = sorted(glob(f"{CSRC}/**/*.cpp", recursive=True))
HEADERS = sorted(
    header for ending in ("h", "inc") for header in glob(f"{CSRC}/**/*.{ending}", recursive=True)
)
# No contraction: a product and a sum are fused where the source says so and nowhere else, which
# keeps results independent of how the compiler unrolled a loop.
FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-ffp-contract=off", "-fvisibility=hidden"]
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []


class PlainLibraryWheel(bdist_wheel):
    """Tags the wheel ``py3-none-<platform>``: the library uses no symbol of Python's."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    cmdclass={"bdist_wheel": PlainLibraryWheel},
    ext_modules=[
        Extension(
            "loraplex_kernels.cpu._native",
            sources=SOURCES,
            include_dirs=[CSRC],
            depends=HEADERS,
            extra_compile_args=FLAGS + OPENMP,
            language="c++",
            optional=True,
        )
    ],
)
