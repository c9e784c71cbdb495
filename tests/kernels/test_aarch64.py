"""The portable kernels compile for aarch64, where GCC's vector extensions become NEON."""

import shutil
import subprocess
from pathlib import Path

import pytest

_COMPILER = "aarch64-linux-gnu-g++"
_SOURCES = Path(__file__).parents[2] / "kernels" / "loraplex_kernels" / "cpu" / "csrc"


@pytest.mark.skipif(
    shutil.which(_COMPILER) is None,
    reason=f"no {_COMPILER}; on Debian: apt-get install g++-aarch64-linux-gnu",
)
def test_the_library_compiles_and_multiplies_and_adds_in_one_instruction(tmp_path: Path) -> None:
    built = tmp_path / "native.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off", "-Wall"]
    sources = sorted(map(str, _SOURCES.rglob("*.cpp")))
    run = subprocess.run(
        [_COMPILER, *flags, "-Werror", f"-I{_SOURCES}", *sources, "-o", str(built)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    listing = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-d", str(built)], capture_output=True, text=True, check=True
    ).stdout
    assert any("fmla" in line and ".4s" in line for line in listing.splitlines())
