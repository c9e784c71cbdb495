"""Runs the device tests in Triton's CPU interpreter, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_FOLDER = Path(__file__).parent / "device"
_ROOT = Path(__file__).parents[3]
_PROCESSES = (
    ["test_lora.py"],
    ["test_attention.py", "test_experts.py"],
    [
        *("test_routing.py", "test_norm_and_gate.py", "test_quantized_linear.py"),
        *("test_matmul.py", "test_sampling.py", "test_benchmark.py"),
    ],
)


def test_every_module_is_run() -> None:
    there = {path.name for path in _FOLDER.glob("test_*.py")}
    assert {module for modules in _PROCESSES for module in modules} == there


@pytest.mark.parametrize("modules", _PROCESSES, ids=lambda modules: modules[0])
def test_kernels_pass_under_the_interpreter(modules: list[str]) -> None:
    """Few processes: each takes five seconds to start."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *(str(_FOLDER / module) for module in modules)],
        cwd=_ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
