"""The portable kernels compile for aarch64, where GCC's vector extensions become NEON."""

import shutil
import subprocess
from pathlib import Path

import pytest

_COMPILER = "aarch64-linux-gnu-g++"
_SOURCES = Path(__file__).parents[2] / "kernels" / "loraplex_kernels" / "cpu" / "csrc"


pytestmark = pytest.mark.skipif(
    shutil.which(_COMPILER) is None,
    reason=f"no {_COMPILER}; on Debian: apt-get install g++-aarch64-linux-gnu",
)


def _compile(*flags: str) -> None:
    sources = sorted(map(str, _SOURCES.rglob("*.cpp")))
    command = [_COMPILER, "-std=c++17", "-fopenmp", "-Wall", "-Werror", f"-I{_SOURCES}"]
    run = subprocess.run([*command, *flags, *sources], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_every_source_is_valid_for_aarch64() -> None:
    _compile("-fsyntax-only")


@pytest.mark.nightly
def test_the_library_multiplies_and_adds_in_one_instruction(tmp_path: Path) -> None:
    built = tmp_path / "native.so"
    _compile("-O2", "-fPIC", "-shared", "-ffp-contract=off", "-o", str(built))
    listing = subprocess.run(
        ["aarch64-linux-gnu-objdump", "-d", str(built)], capture_output=True, text=True, check=True
    ).stdout
    assert any("fmla" in line and ".4s" in line for line in listing.splitlines())
