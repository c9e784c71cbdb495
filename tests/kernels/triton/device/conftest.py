"""These tests run the kernels: on a GPU where there is one, else in Triton's interpreter.

The interpreter must be chosen before Triton is imported, so without a GPU they are collected only
in a process of their own (``test_under_the_interpreter.py`` starts it).
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

if INTERPRETED:
    from tests.support.gpu.triton_interpreter import mend_interpreter

    mend_interpreter()

collect_ignore_glob = [] if INTERPRETED or torch.cuda.is_available() else ["test_*.py"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/kernels/triton/device" in item.path.as_posix() and not INTERPRETED:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")
