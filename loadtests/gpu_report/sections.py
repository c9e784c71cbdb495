"""What is measured: the device tests, kernels beside their roofline, serving, a profile."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from .random_model import LLAMA_8B, TINY, write_random_model
from .report import Skipped, Work
from .serving import FULL_LOAD, SMALL_LOAD, compare_serving

__all__ = ["Plan", "roofline_shares", "sections_of", "test_counts"]

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run, and until when."""

    tokenizer_of: Path  # a base; where no ``model`` is given, the tokenizer of the random one
    model: Path | None  # the base that is served and profiled; None: one is made
    has_device: bool
    quick: bool
    deadline: float  # of ``time.monotonic``; a command that runs then is stopped


def sections_of(plan: Plan) -> Mapping[str, Work]:
    works: dict[str, Work] = {
        "device tests": partial(_device_tests, plan=plan),
        "LoRA kernels": partial(_lora_kernels, plan=plan),
        "attention": partial(_attention, plan=plan),
        "serving": partial(_serving, plan=plan),
        "profile": partial(_profile, plan=plan),
    }
    needs_none = {"serving"}
    return {
        name: partial(_within, work, plan, needs_device=name not in needs_none)
        for name, work in works.items()
    }


def _within(work: Work, plan: Plan, folder: Path, *, needs_device: bool) -> Any:
    if needs_device and not plan.has_device:
        raise Skipped("it needs a CUDA device, and torch sees none here")
    if time.monotonic() > plan.deadline:
        raise Skipped("the time was over; --minutes gives more")
    return work(folder)


def _device_tests(folder: Path, *, plan: Plan) -> Iterator[Mapping[str, Any]]:
    file = folder / "device-tests.xml"
    tests = ["tests/kernels", "tests/server", "-m", "gpu", "-q", f"--junitxml={file}"]
    _run([sys.executable, "-m", "pytest", *tests], folder / "device-tests.log", plan, may_fail=True)
    yield test_counts(file.read_text(encoding="utf-8"))


def test_counts(junit_xml: str) -> Mapping[str, Any]:
    """Numbers of tests, and the names of those that failed."""
    suite = next(ET.fromstring(junit_xml).iter("testsuite"))
    failed = [
        {"failed": f"{case.get('classname')}.{case.get('name')}"}
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {
        "tests": int(suite.get("tests", 0)),
        "skipped": int(suite.get("skipped", 0)),
        "failures": len(failed),
        "failed": failed,
    }


test_counts.__test__ = False  # type: ignore[attr-defined]  # for pytest: no test


def _lora_kernels(folder: Path, *, plan: Plan) -> Iterator[Mapping[str, Any]]:
    results = folder / "kernels"
    command = [sys.executable, "kernels/benchmarks/bench_gpu.py", f"--output={results}"]
    _run([*command, *(["--quick"] if plan.quick else [])], folder / "kernels.log", plan)
    (file,) = results.glob("gpu-*.json")
    document = json.loads(file.read_text(encoding="utf-8"))
    left_out = {f"without {name}": why for name, why in document["left_out"].items()}
    yield {**left_out, **roofline_shares(document["cells"])}


def roofline_shares(cells: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Of each module, number of rows and system: median time, and share of the bytes roofline."""
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = defaultdict(list)
    for cell in cells:
        groups[cell["point"]["module"], cell["point"]["n_rows"], cell["system"]].append(cell)
    ours = [cell["repeats_bitwise"] for cell in cells if cell["system"] == "loraplex"]
    return {
        "ours repeat bitwise": f"{sum(ours)} of {len(ours)}",
        "rows": [
            {
                "module": module,
                "rows": n_rows,
                "system": system,
                "µs": statistics.median(cell["microseconds"] for cell in group),
                "% of roofline": statistics.median(cell["roofline_percent"] for cell in group),
                "largest error": max(cell["largest_error"] for cell in group),
            }
            for (module, n_rows, system), group in sorted(groups.items())
        ],
    }


def _attention(folder: Path, *, plan: Plan) -> Iterator[Mapping[str, Any]]:
    results = folder / "attention"
    command = [sys.executable, "kernels/benchmarks/bench_attention.py", f"--output={results}"]
    _run(command, folder / "attention.log", plan)
    (file,) = results.glob("attention-*.json")
    document = json.loads(file.read_text(encoding="utf-8"))
    why = document["without flashinfer"]
    yield {**({} if why is None else {"without flashinfer": why}), "rows": document["cells"]}


def _serving(folder: Path, *, plan: Plan) -> Iterator[Mapping[str, Any]]:
    return compare_serving(
        folder,
        model=_model(folder, plan),
        load=FULL_LOAD if plan.has_device else SMALL_LOAD,
        dtype="bfloat16" if plan.has_device else None,
        deadline=plan.deadline,
    )


def _profile(folder: Path, *, plan: Plan) -> Iterator[Mapping[str, Any]]:
    file = folder / "profile.json"
    model = _model(folder, plan)
    command = [sys.executable, "server/benchmarks/profile_steps.py", str(model), str(file)]
    _run(command, folder / "profile.log", plan)
    yield json.loads(file.read_text(encoding="utf-8"))


def _model(folder: Path, plan: Plan) -> Path:
    """The one that was asked for, or one of random weights, made at its first use."""
    if plan.model is not None:
        return plan.model
    made = folder / "model"
    if not (made / "model.safetensors.index.json").exists():  # it is written last
        write_random_model(LLAMA_8B if plan.has_device else TINY, plan.tokenizer_of, made)
    return made


def _run(command: list[str], log: Path, plan: Plan, *, may_fail: bool = False) -> None:
    """Its output goes to ``log``. A stop from the keyboard ends it first."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(max(1.0, plan.deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"stopped when the time was over; see {log.name}") from None
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if code and not may_fail:
        end = log.read_text(errors="replace")[-1500:]
        raise RuntimeError(f"{' '.join(command[1:3])} ended with {code}: {end}")
