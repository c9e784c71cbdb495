"""What is measured: the device tests, kernels beside their roofline, serving, a profile."""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import time
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from loraplex_server.model.pull import DEFAULT_BASE, resolve_model

from .process import run_until
from .random_model import LLAMA_8B, TINY, write_random_model
from .report import Skipped, Work
from .serving import FULL_LOAD, SMALL_LOAD, compare_serving

__all__ = [
    "Plan",
    "device_test_files",
    "roofline_shares",
    "section_end",
    "sections_of",
    "test_counts",
]

ROOT = Path(__file__).parents[2]
# Parts of the time. A section that hangs leaves the others theirs; what one leaves, they share.
_SHARES = {"device tests": 12, "LoRA kernels": 10, "attention": 5, "serving": 28, "profile": 5}
_SERVING_BYTES = 42 << 30  # of an 8B, of 256 adapters, and of these in the store


@dataclass(frozen=True, slots=True)
class Plan:
    """What is run, and until when."""

    model: Path | None  # the base that is served and profiled; None: one is made
    has_device: bool
    quick: bool
    deadline: float  # of ``time.monotonic``; a command that runs then is stopped
    vllm_venv: Path | None = None


def sections_of(plan: Plan) -> Mapping[str, Work]:
    works: dict[str, Callable[..., Any]] = {
        "device tests": _device_tests,
        "LoRA kernels": _lora_kernels,
        "attention": _attention,
        "serving": _serving,
        "profile": _profile,
    }
    needs_none = {"serving"}
    return {
        name: partial(_within, name, work, plan, needs_device=name not in needs_none)
        for name, work in works.items()
    }


def _within(
    name: str, work: Callable[..., Any], plan: Plan, folder: Path, *, needs_device: bool
) -> Any:
    if needs_device and not plan.has_device:
        raise Skipped("it needs a CUDA device, and torch sees none here")
    now = time.monotonic()
    if now > plan.deadline:
        raise Skipped("the time was over; --minutes gives more")
    return work(folder, plan=replace(plan, deadline=section_end(name, now, plan.deadline)))


def section_end(name: str, now: float, deadline: float) -> float:
    """When section ``name``, which begins ``now``, is stopped for the sake of those behind it."""
    names = list(_SHARES)
    left = [_SHARES[other] for other in names[names.index(name) :]]
    return now + (deadline - now) * left[0] / sum(left)


def _device_tests(folder: Path, *, plan: Plan) -> Iterator[Mapping[str, Any]]:
    """Each file in a process of its own: after an illegal access a process's device is lost."""
    logs = _empty(folder / "device-tests")
    result: dict[str, Any] = {"tests": 0, "skipped": 0, "failures": 0}
    failed: list[Mapping[str, Any]] = []
    for file in device_test_files():
        if time.monotonic() > plan.deadline:
            result[f"without {file}"] = "the section's time was over"
            continue
        found = logs / f"{Path(file).stem}.xml"
        arguments = [file, "-m", "gpu", "-q", f"--junitxml={found}"]
        try:
            _run(
                [sys.executable, "-m", "pytest", *arguments],
                found.with_suffix(".log"),
                plan,
                {0, 1},
            )
            counts = dict(test_counts(found.read_text(encoding="utf-8")))
        except (RuntimeError, OSError, ET.ParseError) as error:
            result[f"{file} broke off"] = str(error)[-500:]
            continue
        failed += counts.pop("failed")
        result |= {name: result[name] + n for name, n in counts.items()}
        yield {**result, "failed": failed}
    yield {**result, "failed": failed}


def device_test_files() -> list[str]:
    """The files with tests of a device, kernels first; as ``make gpu`` finds them."""
    kernels = sorted((ROOT / "tests/kernels/triton/device").glob("test_*.py"))
    others = sorted((ROOT / "tests/server").rglob("test_*.py"))
    marked = [file for file in others if "pytest.mark.gpu" in file.read_text(encoding="utf-8")]
    return [file.relative_to(ROOT).as_posix() for file in (*kernels, *marked)]


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
    results = _empty(folder / "kernels")
    command = [sys.executable, "kernels/benchmarks/bench_gpu.py", f"--output={results}"]
    if plan.quick:
        command.append("--quick")
    for document in _measured(command, results, folder / "kernels.log", plan):
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
    results = _empty(folder / "attention")
    command = [sys.executable, "kernels/benchmarks/bench_attention.py", f"--output={results}"]
    for document in _measured(command, results, folder / "attention.log", plan):
        why = document["without flashinfer"]
        yield {**({} if why is None else {"without flashinfer": why}), "rows": document["cells"]}


def _measured(command: list[str], results: Path, log: Path, plan: Plan) -> Iterator[Any]:
    """What ``command`` wrote to ``results``, even if it then broke off; raises why it did."""
    failure = None
    try:
        _run(command, log, plan, {0})
    except RuntimeError as error:
        failure = error
    for file in results.glob("*.json"):
        yield json.loads(file.read_text(encoding="utf-8"))
    if failure is not None:
        raise failure


def _serving(folder: Path, *, plan: Plan) -> Iterator[Mapping[str, Any]]:
    free = shutil.disk_usage(folder).free
    if plan.has_device and plan.model is None and free < _SERVING_BYTES:
        raise Skipped(
            f"it needs {_SERVING_BYTES >> 30} GiB at {folder}, and {free >> 30} are free; --out "
            "names another folder"
        )
    return compare_serving(
        folder,
        model=_model(folder, plan),
        load=FULL_LOAD if plan.has_device else SMALL_LOAD,
        dtype="bfloat16" if plan.has_device else None,
        deadline=plan.deadline,
        vllm_venv=plan.vllm_venv,
    )


def _profile(folder: Path, *, plan: Plan) -> Iterator[Mapping[str, Any]]:
    file = folder / "profile.json"
    model = _model(folder, plan)
    command = [sys.executable, "server/benchmarks/profile_steps.py", str(model), str(file)]
    _run(command, folder / "profile.log", plan, {0})
    yield json.loads(file.read_text(encoding="utf-8"))


def _model(folder: Path, plan: Plan) -> Path:
    """The one that was asked for, or one of random weights, made at its first use."""
    if plan.model is not None:
        return plan.model
    made = folder / "model"
    if not (made / "model.safetensors.index.json").exists():  # it is written last
        tokenizer_of = resolve_model(DEFAULT_BASE)
        write_random_model(LLAMA_8B if plan.has_device else TINY, tokenizer_of, made)
    return made


def _empty(folder: Path) -> Path:
    """Without what an earlier run left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _run(command: list[str], log: Path, plan: Plan, expected: set[int]) -> None:
    """Its output goes to ``log``. Raises RuntimeError with the end of it for other statuses."""
    code = run_until(command, log, plan.deadline, cwd=ROOT)
    if code is None:
        raise RuntimeError(f"stopped when the section's time was over; see {log.name}")
    if code not in expected:
        end = log.read_text(errors="replace")[-1500:]
        raise RuntimeError(f"{' '.join(command[1:3])} ended with {code}: {end}")
