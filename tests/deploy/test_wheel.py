"""The wheel says what it is: one plain C library for a platform, for every Python 3."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRINT_TAG = """
import setuptools  # brings distutils
from distutils.core import run_setup
wheel = run_setup("setup.py", stop_after="config").get_command_obj("bdist_wheel")
wheel.ensure_finalized()
print("-".join(wheel.get_tag()))
"""


def test_the_wheel_is_tagged_for_every_python_3_and_one_platform() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRINT_TAG], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    python, abi, platform = done.stdout.split()[-1].split("-", 2)
    assert (python, abi) == ("py3", "none")
    assert platform != "any"


def test_the_native_library_uses_no_symbol_of_python() -> None:
    libraries = list((ROOT / "kernels/loraplex_kernels/cpu").glob("_native*.so"))
    if not libraries:
        pytest.skip("the native library is not built")
    for library in libraries:
        assert not re.findall(rb"\0_?Py[A-Z_]\w+\0", library.read_bytes())


# What AlmaLinux 8 has, on which manylinux_2_28 is built.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}


def test_the_native_library_runs_on_every_linux_since_2018() -> None:
    libraries = list((ROOT / "kernels/loraplex_kernels/cpu").glob("_native*.so"))
    if not libraries or sys.platform != "linux":
        pytest.skip("the native library is not built")
    for library in libraries:
        found = re.findall(rb"\0(GLIBC|GLIBCXX|CXXABI)_([\d.]+)(?=\0)", library.read_bytes())
        assert found
        for name, version in found:
            needed = tuple(map(int, version.decode().split(".")))
            assert needed <= NEWEST[name.decode()], (name, version)
