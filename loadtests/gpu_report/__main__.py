"""The command of ``make gpu-report``: tests, kernels, serving and a profile in one page.

Each section takes at most eight minutes, and ``--only first`` is what to run in the first ten on a
new machine. Stop it whenever you like: ``report.html`` and ``report.json`` hold all that is done by
then, and the same command goes on with what is not, within a section too. The base has eight layers
of Llama-3.1-8B's shape and random weights, unless --layers or --model says otherwise. Nothing is
downloaded; ``--wheels`` prints what a machine without network needs.
"""

import argparse
import importlib.metadata
import shutil
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
from loraplex_server.model.loading.pull import resolve_model

from .report import Report, done_before, run_sections
from .sections import GROUPS, SECTIONS, Plan, sections_of

NO_DEVICE = (
    "torch sees no CUDA device here, so there is nothing to report; run it where a GPU is, or give "
    "--dry-run for what a CPU can do."
)
_PACKAGES = ("torch", "triton", "transformers", "flashinfer-python", "vllm", "sglang")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-report", description=__doc__)
    parser.add_argument("--model", help="Base model to serve.")
    parser.add_argument(
        "--minutes", type=float, help="Minutes for all sections. Default: 8 for each of them."
    )
    parser.add_argument(
        "--only",
        action="append",
        choices=["first", *SECTIONS],
        help="Run this section; may be given again. first: core tests and profile.",
    )
    parser.add_argument("--layers", type=int, default=8, help="Layers of the base that is made.")
    parser.add_argument(
        "--wheels", action="store_true", help="Print the wheels that this machine uses, and end."
    )
    parser.add_argument("--dry-run", action="store_true", help="Run on a CPU, with a tiny base.")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu-report"), help="Folder of the report."
    )
    parser.add_argument(
        "--full", action="store_true", help="Measure the whole grid of kernels, which takes hours."
    )
    parser.add_argument(
        "--vllm-venv", type=Path, help="Virtual environment of vLLM; default: this one."
    )
    parser.add_argument("--anew", action="store_true", help="Run finished sections again.")
    options = parser.parse_args(arguments)
    if options.wheels:
        print("\n".join(wheels()))
        return 0
    chosen = [each for name in options.only or SECTIONS for each in GROUPS.get(name, (name,))]
    minutes = options.minutes or 8 * len(chosen)
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
        deadline=time.monotonic() + 60 * minutes,
        vllm_venv=options.vllm_venv,
        n_layers=options.layers,
        commit=commit(),
    )
    if options.anew:
        shutil.rmtree(plan.work(folder), ignore_errors=True)
    for number in (signal.SIGTERM, signal.SIGHUP):  # a lost connection is a stop like another
        signal.signal(number, _stop)
    report = _new_report(options.model, plan)
    kept = [] if options.anew else done_before(report, folder)
    is_whole = run_sections(report, sections_of(plan, chosen), folder, kept=kept)
    print(f"{folder / 'report.html'}{'' if is_whole else ' (stopped; what was done is in it)'}")
    return 0 if is_whole else 130


def _stop(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _new_report(model: str | None, plan: Plan) -> Report:
    shape = f"{plan.n_layers} layers of Llama-3.1-8B's shape" if plan.has_device else "a tiny Llama"
    grid = {} if plan.quick else {"grid": "whole"}
    return Report(
        device={**_device(plan), **grid, "base": model or f"{shape}, random weights"},
        versions={name: _version(name) for name in _PACKAGES},
        commit=plan.commit,
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


def wheels() -> list[str]:
    """Return ``name==version`` of what is installed here, for ``pip download`` elsewhere."""
    found = importlib.metadata.distributions()
    return sorted({f"{each.name}=={each.version}" for each in found if each.name != "loraplex"})


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
