"""What is measured: the device tests, the kernels beside their roofline, serving, a profile."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loadtests.baselines.vllm_gpu import VllmGpu
from loadtests.client import Outcome, StreamingClient
from loadtests.random_adapters import write_lora
from loadtests.systems import Loraplex, System, started

from .report import Skipped, Work

__all__ = ["roofline_shares", "sections_of", "serving_numbers", "test_counts"]

ROOT = Path(__file__).parents[2]
_N_ADAPTERS, _N_CLIENTS, _N_REQUESTS, _N_TOKENS = 16, 64, 256, 128
_PROMPT = "Write a long story about a lighthouse keeper who repairs clocks. " * 8


def sections_of(model: Path, *, quick: bool) -> Mapping[str, Work]:
    """``model``: the directory of the base that is served and profiled."""
    return {
        "device tests": _device_tests,
        "kernels": partial(_kernels, quick=quick),
        "serving": partial(_serving, model=model),
        "profile": partial(_profile, model=model),
    }


def _device_tests(folder: Path) -> Mapping[str, Any]:
    file = folder / "device-tests.xml"
    tests = ["tests/kernels", "tests/server", "-m", "gpu", "-q", f"--junitxml={file}"]
    _run([sys.executable, "-m", "pytest", *tests], folder / "device-tests.log", may_fail=True)
    return test_counts(file.read_text(encoding="utf-8"))


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


def _kernels(folder: Path, *, quick: bool) -> Mapping[str, Any]:
    results = folder / "kernels"
    command = [sys.executable, "kernels/benchmarks/bench_gpu.py", f"--output={results}"]
    _run([*command, *(["--quick"] if quick else [])], folder / "kernels.log")
    (file,) = results.glob("*.json")
    return roofline_shares(json.loads(file.read_text(encoding="utf-8"))["cells"])


def roofline_shares(cells: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Of each module, number of rows and system: median time, and share of the bytes roofline."""
    groups: dict[tuple[str, int, str], list[Mapping[str, Any]]] = defaultdict(list)
    for cell in cells:
        groups[cell["point"]["module"], cell["point"]["n_rows"], cell["system"]].append(cell)
    return {
        "all repeat bitwise": all(c["repeats_bitwise"] for c in cells if c["system"] == "ours"),
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


def _serving(folder: Path, *, model: Path) -> Mapping[str, Any]:
    adapters = [
        write_lora(model, folder / "adapters" / f"lora-{i}", rank=16, seed=i)
        for i in range(_N_ADAPTERS)
    ]
    rows: list[Mapping[str, Any]] = []
    left_out: dict[str, str] = {}
    for system in (Loraplex(), VllmGpu()):
        why = system.missing()
        if why is not None:
            left_out[f"without {system.name}"] = why
            continue
        with started(system, model, adapters, folder, dtype="bfloat16") as target:
            for n_adapters in (0, 1, _N_ADAPTERS):
                names = [path.name for path in adapters[:n_adapters]] or [None]
                _load(target.url, system, names, 2 * len(names))  # warm
                began = time.perf_counter()
                outcomes = _load(target.url, system, names, _N_REQUESTS)
                numbers = serving_numbers(outcomes, time.perf_counter() - began)
                rows.append({"system": system.name, "adapters": n_adapters, **numbers})
    return {"clients": _N_CLIENTS, "tokens each": _N_TOKENS, **left_out, "rows": rows}


def serving_numbers(outcomes: Sequence[Outcome], seconds: float) -> Mapping[str, Any]:
    """Rates and medians of the requests that were answered whole."""
    whole = [o for o in outcomes if o.error is None and o.status == 200 and o.ttft_s is not None]
    return {
        "answered": len(whole),
        "lost": len(outcomes) - len(whole),
        "tokens/s": sum(o.n_tokens for o in whole) / seconds,
        "TTFT ms": 1e3 * statistics.median([o.ttft_s for o in whole if o.ttft_s] or [0.0]),
        "TPOT ms": 1e3 * statistics.median([o.tpot_s for o in whole] or [0.0]),
    }


def _load(url: str, system: System, names: Sequence[str | None], n_requests: int) -> list[Outcome]:
    client, outcomes = StreamingClient(url), []
    numbers = iter(range(n_requests))
    lock = threading.Lock()

    def work() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            outcome = client.stream(
                {
                    **system.body("lora", names[number % len(names)]),
                    "messages": [{"role": "user", "content": f"{number}. {_PROMPT}"}],
                    "max_tokens": _N_TOKENS,
                    "temperature": 0.0,
                    "ignore_eos": True,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
            )
            with lock:
                outcomes.append(outcome)

    threads = [threading.Thread(target=work) for _ in range(min(_N_CLIENTS, n_requests))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.close()
    return outcomes


def _profile(folder: Path, *, model: Path) -> Mapping[str, Any]:
    if find_spec("torch.profiler") is None:
        raise Skipped("this torch has no profiler")
    file = folder / "profile.json"
    command = [sys.executable, "server/benchmarks/profile_steps.py", str(model), str(file)]
    _run(command, folder / "profile.log")
    found: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def _run(command: list[str], log: Path, *, may_fail: bool = False) -> None:
    """Its output goes to ``log``. A stop from the keyboard ends it first."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if code and not may_fail:
        end = log.read_text(errors="replace")[-1500:]
        raise RuntimeError(f"{' '.join(command[1:3])} ended with {code}: {end}")
