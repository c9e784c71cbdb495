"""Runs the device tests in Triton's CPU interpreter, in a process of their own.

Cases that repeat a claim for another dtype are marked nightly.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_FOLDER = Path(__file__).parent / "device"
_ROOT = Path(__file__).parents[3]


@pytest.mark.interpreter
def test_kernels_pass_under_the_interpreter() -> None:
    _run("not nightly")


@pytest.mark.nightly
@pytest.mark.slow
def test_kernels_pass_under_the_interpreter_in_every_dtype() -> None:
    _run("nightly")


def _run(selection: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", str(_FOLDER), "-m", selection],
        cwd=_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
