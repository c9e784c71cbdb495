"""``make gpu-report``: tests, kernels, serving and a profile on this machine's GPU, in one page.

Stop it whenever you like: ``report.html`` and ``report.json`` hold all that is done by then. The
base that is served has the shape of Llama-3.1-8B and random weights, unless --model names another.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from loadtests.provenance import commit, machine
from loraplex_server.model.pull import DEFAULT_BASE, resolve_model

from .report import Report, run_sections
from .sections import Plan, sections_of

NO_DEVICE = (
    "torch sees no CUDA device here, so there is nothing to report; run it where a GPU is, or give "
    "--dry-run for what a CPU can do."
)
_PACKAGES = ("torch", "triton", "transformers", "flashinfer-python", "vllm", "sglang")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-report", description=__doc__)
    parser.add_argument("--model", help="the base that is served")
    parser.add_argument("--minutes", type=float, default=60, help="no section begins later")
    parser.add_argument(
        "--dry-run", action="store_true", help="on a CPU: the same, over a tiny base"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-report"), help="a folder")
    parser.add_argument("--full", action="store_true", help="the kernels' whole grid, for hours")
    options = parser.parse_args(arguments)
    has_device = torch.cuda.is_available()
    if not (has_device or options.dry_run):
        print(NO_DEVICE)
        return 0
    folder: Path = options.out.resolve()
    plan = Plan(
        tokenizer_of=resolve_model(DEFAULT_BASE),
        model=None if options.model is None else resolve_model(options.model),
        has_device=has_device and not options.dry_run,
        quick=not options.full,
        deadline=time.monotonic() + 60 * options.minutes,
    )
    is_whole = run_sections(_new_report(options.model, plan), sections_of(plan), folder)
    print(f"{folder / 'report.html'}{'' if is_whole else ' (stopped; what was done is in it)'}")
    return 0 if is_whole else 130


def _new_report(model: str | None, plan: Plan) -> Report:
    shape = "Llama-3.1-8B's shape" if plan.has_device else "a tiny Llama"
    return Report(
        device={**_device(plan), "base": model or f"{shape}, random weights"},
        versions={name: _version(name) for name in _PACKAGES},
        commit=commit(),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _device(plan: Plan) -> dict[str, object]:
    if not plan.has_device:
        return {"name": "a dry run on a CPU", **machine()}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory MiB": properties.total_memory >> 20,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "CUDA": torch.version.cuda,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
