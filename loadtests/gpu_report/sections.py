"""The sections of the report: device tests, a profile, kernels with roofline, and serving."""

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

from .process import run_until
from .random_model import LLAMA_8B, TINY, write_random_model
from .report import Skipped, Work
from .serving import FULL_LOAD, SMALL_LOAD, compare_serving

ROOT = Path(__file__).parents[2]
SECTIONS = ("core tests", "profile", "LoRA kernels", "attention", "device tests", "serving")
GROUPS = {"first": ("core tests", "profile")}
_CORE_TESTS = ("test_lora.py", "test_group_rows.py", "test_experts.py", "test_attention.py")
_LAYER_BYTES = 1 << 30  # of the base, of 256 adapters, and of these in the store


@dataclass(frozen=True, slots=True)
class Plan:
    """The settings of a report, and its deadline."""

    model: Path | None  # the base that is served and profiled; None: one is made
    has_device: bool
    quick: bool
    deadline: float  # of ``time.monotonic``; a command that runs then is stopped
    vllm_venv: Path | None = None
    n_layers: int = 8  # of the base that is made
    commit: str = "unknown"

    def work(self, folder: Path) -> Path:
        """Return the folder of what this commit measured, which a later run continues."""
        made = folder / f"work-{self.commit}"
        made.mkdir(parents=True, exist_ok=True)
        return made


def sections_of(plan: Plan, names: Sequence[str] = SECTIONS) -> Mapping[str, Work]:
    works: dict[str, Callable[..., Any]] = {
        "core tests": partial(_device_tests, files=core_test_files()),
        "profile": _profile,
        "LoRA kernels": _lora_kernels,
        "attention": _attention,
        "device tests": partial(_device_tests, files=device_test_files()),
        "serving": _serving,
    }
    return {
        name: partial(_within, works[name], plan, n_left=len(names) - index)
        for index, name in enumerate(names)
    }


def _within(work: Callable[..., Any], plan: Plan, folder: Path, *, n_left: int) -> Any:
    """``n_left``: the sections that share the time until the deadline, this one included."""
    now = time.monotonic()
    if now > plan.deadline:
        raise Skipped("the time was over; --minutes gives more")
    return work(folder, plan=replace(plan, deadline=now + (plan.deadline - now) / n_left))


def _device_tests(folder: Path, *, plan: Plan, files: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """Run each file in a process of its own: an illegal access loses a process's device.

    Without a device the files are collected, which a dry run shows to work.
    """
    logs = plan.work(folder)
    result: dict[str, Any] = {"tests": 0, "skipped": 0, "failures": 0}
    failed: list[Mapping[str, Any]] = []
    for file in files:
        found = logs / f"{Path(file).stem}.xml"
        arguments = [file, "-m", "gpu", "-q", f"--junitxml={found}"]
        if not plan.has_device:
            arguments.append("--collect-only")
        try:
            if not found.exists():  # pytest writes it when a file is done
                if time.monotonic() > plan.deadline:
                    result[f"without {file}"] = "the section's time was over"
                    continue
                command = [sys.executable, "-m", "pytest", *arguments]
                _run(command, found.with_suffix(".log"), plan, {0, 1})
            counts = dict(test_counts(found.read_text(encoding="utf-8")))
        except (RuntimeError, OSError, ET.ParseError) as error:
            result[f"{file} broke off"] = str(error)[-500:]
            continue
        failed += counts.pop("failed")
        result |= {name: result[name] + n for name, n in counts.items()}
        yield {**result, "failed": failed}
    yield {**result, "failed": failed}


def device_test_files() -> list[str]:
    """Return the files with device tests that ``make gpu`` runs, kernels first."""
    kernels = sorted((ROOT / "tests/kernels/triton/device").glob("test_*.py"))
    others = sorted((ROOT / "tests/server").rglob("test_*.py"))
    marked = [file for file in others if "pytest.mark.gpu" in file.read_text(encoding="utf-8")]
    return [file.relative_to(ROOT).as_posix() for file in (*kernels, *marked)]


def core_test_files() -> list[str]:
    """Return the files of the LoRA, routing and attention kernels, against their references."""
    return [f"tests/kernels/triton/device/{name}" for name in _CORE_TESTS]


def test_counts(junit_xml: str) -> Mapping[str, Any]:
    """Return the counts of tests and the names of failed tests."""
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
    results = plan.work(folder) / "kernels"
    command = [sys.executable, "-m", "kernels.benchmarks.bench_gpu", f"--output={results}"]
    if plan.quick:
        command.append("--quick")
    for document in _measured(command, results, plan):
        left_out = {f"without {name}": why for name, why in document["left_out"].items()}
        yield {**left_out, **roofline_shares(document["cells"])}


def roofline_shares(cells: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return median time and share of the bytes roofline by module, row count and system."""
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
    results = plan.work(folder) / "attention"
    command = [sys.executable, "-m", "kernels.benchmarks.bench_attention", f"--output={results}"]
    for document in _measured(command, results, plan):
        why = document["without flashinfer"]
        yield {**({} if why is None else {"without flashinfer": why}), "rows": document["cells"]}


def _measured(command: list[str], results: Path, plan: Plan) -> Iterator[Any]:
    """Yield what ``command`` wrote to ``results``, then raise if the command failed.

    The command goes on with what an earlier run has left in ``results``. Without a device it lists
    what it would measure.
    """
    failure = None
    try:
        _run(command, results.with_suffix(".log"), plan, {0})
    except RuntimeError as error:
        failure = error
    for file in results.glob("*.json"):
        yield json.loads(file.read_text(encoding="utf-8"))
    if failure is not None:
        raise failure


def _serving(folder: Path, *, plan: Plan) -> Iterator[Mapping[str, Any]]:
    free, needed = shutil.disk_usage(folder).free, (4 + plan.n_layers) * _LAYER_BYTES
    if plan.has_device and plan.model is None and free < needed:
        raise Skipped(
            f"it needs {needed >> 30} GiB at {folder}, and {free >> 30} are free; --out names "
            "another folder"
        )
    return compare_serving(
        folder,
        kept=plan.work(folder) / "serving.json",
        model=_model(folder, plan),
        load=FULL_LOAD if plan.has_device else SMALL_LOAD,
        dtype="bfloat16" if plan.has_device else None,
        deadline=plan.deadline,
        vllm_venv=plan.vllm_venv,
    )


def _profile(folder: Path, *, plan: Plan) -> Iterator[Mapping[str, Any]]:
    file = plan.work(folder) / "profile.json"
    model = _model(folder, plan)
    command = [sys.executable, "-m", "loadtests.parts.profile_steps", str(model), str(file)]
    _run(command, file.with_suffix(".log"), plan, {0})
    yield json.loads(file.read_text(encoding="utf-8"))


def _model(folder: Path, plan: Plan) -> Path:
    """Return the requested base, or one with random weights that is written at first use."""
    if plan.model is not None:
        return plan.model
    shape = LLAMA_8B | {"num_hidden_layers": plan.n_layers} if plan.has_device else TINY
    made = folder / f"model-{shape['num_hidden_layers']}-layers"
    if not (made / "model.safetensors.index.json").exists():  # it is written last
        write_random_model(shape, made)
    return made


def _run(command: list[str], log: Path, plan: Plan, expected: set[int]) -> None:
    """Run the command with its output in ``log``. Raises RuntimeError for other statuses."""
    code = run_until(command, log, plan.deadline, cwd=ROOT)
    if code is None:
        raise RuntimeError(f"stopped when the section's time was over; see {log.name}")
    if code not in expected:
        end = log.read_text(errors="replace")[-1500:]
        raise RuntimeError(f"{' '.join(command[1:3])} ended with {code}: {end}")
