"""``make gpu-report``: tests, kernels, serving and a profile on this machine's GPU, in one page.

Stop it whenever you like: ``report.html`` and ``report.json`` hold all that is done by then, and
the same command goes on with what is not. The base that is served has the shape of Llama-3.1-8B and
random weights, unless --model names another.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

from loadtests.provenance import commit, machine
from loraplex_server.model.errors import ModelError
from loraplex_server.model.pull import resolve_model

from .report import Report, done_before, run_sections
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
    parser.add_argument("--vllm-venv", type=Path, help="where vLLM is installed, if not here")
    parser.add_argument("--anew", action="store_true", help="sections that are done, too")
    options = parser.parse_args(arguments)
    has_device = torch.cuda.is_available()
    if not (has_device or options.dry_run):
        print(NO_DEVICE)
        return 0
    folder: Path = options.out.resolve()
    try:
        model = None if options.model is None else resolve_model(options.model)
    except ModelError as error:
        print(f"error: {error}")
        return 1
    plan = Plan(
        model=model,
        has_device=has_device and not options.dry_run,
        quick=not options.full,
        deadline=time.monotonic() + 60 * options.minutes,
        vllm_venv=options.vllm_venv,
    )
    for number in (signal.SIGTERM, signal.SIGHUP):  # a lost connection is a stop like another
        signal.signal(number, _stop)
    report = _new_report(options.model, plan)
    kept = [] if options.anew else done_before(report, folder)
    is_whole = run_sections(report, sections_of(plan), folder, kept=kept)
    print(f"{folder / 'report.html'}{'' if is_whole else ' (stopped; what was done is in it)'}")
    return 0 if is_whole else 130


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _new_report(model: str | None, plan: Plan) -> Report:
    shape = "Llama-3.1-8B's shape" if plan.has_device else "a tiny Llama"
    grid = {} if plan.quick else {"grid": "whole"}
    return Report(
        device={**_device(plan), **grid, "base": model or f"{shape}, random weights"},
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
        "driver": _driver(),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
