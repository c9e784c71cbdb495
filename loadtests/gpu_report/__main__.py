"""``make gpu-report``: tests, kernels, serving and a profile on this machine's GPU, in one page.

Stop it whenever you like: ``report.html`` and ``report.json`` hold all that is done by then.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from loadtests.provenance import commit
from loraplex_server.model.pull import DEFAULT_BASE, resolve_model

from .report import Report, run_sections
from .sections import sections_of

NO_DEVICE = "torch sees no CUDA device here, so there is nothing to report; run it where a GPU is."
_PACKAGES = ("torch", "triton", "transformers", "vllm")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-report", description=__doc__)
    parser.add_argument("--model", default=DEFAULT_BASE, help="the base that is served")
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="a folder")
    parser.add_argument("--full", action="store_true", help="the kernels' whole grid, for hours")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(NO_DEVICE)
        return 0
    folder: Path = options.out.resolve()
    works = sections_of(resolve_model(options.model), quick=not options.full)
    is_whole = run_sections(_new_report(options.model), works, folder)
    print(f"{folder / 'report.html'}{'' if is_whole else ' (stopped; what was done is in it)'}")
    return 0 if is_whole else 130


def _new_report(model: str) -> Report:
    properties = torch.cuda.get_device_properties(0)
    return Report(
        device={
            "name": properties.name,
            "memory MiB": properties.total_memory >> 20,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "CUDA": torch.version.cuda,
            "base": model,
        },
        versions={name: _version(name) for name in _PACKAGES},
        commit=commit(),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
