"""Paged attention on one GPU: ours, with and without batch-invariant tiles, beside FlashInfer.

    python -m kernels.benchmarks.bench_attention            steps of decode, of prompts, of both
    python -m kernels.benchmarks.bench_attention --dry-run  lists them; needs no GPU

Every step is captured in a CUDA graph and timed over two caches, so that keys come from memory.
Columns: µs, percent of the bytes roofline (measured copy bandwidth), TFLOP/s, largest difference
to the reference in float32. FlashInfer is skipped with a message where it is not installed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kernels.benchmarks.gpu_workload import time_cold_us
from loraplex_kernels.errors import KernelUnavailable
from loraplex_kernels.layers.flashinfer_attention import FlashInferAttention, PlannedAttention
from loraplex_kernels.layers.model_ops import paged_attention, paged_attention_reference

RESULTS = Path(__file__).parent / "results"
PAGE, HEAD_DIM = 16, 128
HEADS = {"Llama-3.1-8B": (32, 8), "Llama-3.1-70B": (64, 8)}
# (queries, positions) of each request
STEPS: dict[str, list[tuple[int, int]]] = {
    "64 rows over 1,024": [(1, 1024)] * 64,
    "8 rows over 32,768": [(1, 32768)] * 8,
    "a row over 65,536 beside 63 over 512": [(1, 65536), *[(1, 512)] * 63],
    "a prompt of 2,048": [(2048, 2048)],
    "64 rows over 1,024 beside 512 of a prompt of 4,096": [*[(1, 1024)] * 64, (512, 4096)],
}

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Cell:
    base: str
    step: str
    system: str
    microseconds: float
    roofline_percent: float
    tflops: float
    largest_error: float


@dataclass(frozen=True, slots=True)
class Problem:
    q: Tensor
    caches: tuple[Tensor, Tensor]
    page_table: Tensor
    query_starts: Tensor
    kv_lens: Tensor
    requests: list[tuple[int, int]]

    @staticmethod
    def of(
        requests: list[tuple[int, int]], n_heads: int, n_kv: int, device: torch.device
    ) -> Problem:
        n_pages = [-(-length // PAGE) for _, length in requests]
        order = torch.randperm(sum(n_pages)).int()
        table = torch.zeros(len(requests), max(n_pages), dtype=torch.int32)
        for r, pages in enumerate(order.split(n_pages)):
            table[r, : len(pages)] = pages
        shape = (len(order), n_kv, PAGE, HEAD_DIM)
        keys, values = (torch.randn(shape, device=device).bfloat16() for _ in range(2))
        starts = torch.tensor([0, *(n for n, _ in requests)]).cumsum(0).int()
        q = torch.randn(int(starts[-1]), n_heads, HEAD_DIM, device=device).bfloat16()
        lens = torch.tensor([length for _, length in requests], dtype=torch.int32)
        tables = (table.to(device), starts.to(device), lens.to(device))
        return Problem(q, (keys, values), *tables, requests)

    @property
    def n_bytes(self) -> int:
        n_kv = self.caches[0].shape[1]
        positions = sum(length for _, length in self.requests)
        return positions * n_kv * HEAD_DIM * 4 + 2 * self.q.nbytes

    @property
    def flop(self) -> int:
        seen = sum(n * length - n * (n - 1) // 2 for n, length in self.requests)
        return 4 * seen * self.q.shape[1] * HEAD_DIM

    def attend(
        self, *, planned: PlannedAttention | None = None, batch_invariant: bool = False
    ) -> Tensor:
        tables = (self.page_table, self.query_starts, self.kv_lens)
        return paged_attention(
            self.q,
            *self.caches,
            *tables,
            scale=HEAD_DIM**-0.5,
            planned=planned,
            batch_invariant=batch_invariant,
        )

    def expected(self) -> Tensor:
        tables = (self.page_table, self.query_starts, self.kv_lens)
        return paged_attention_reference(self.q, *self.caches, *tables, scale=HEAD_DIM**-0.5)


def systems(problem: Problem, library: FlashInferAttention | None) -> Iterator[tuple[str, Call]]:
    yield "loraplex", problem.attend
    yield "loraplex, batch-invariant", partial(problem.attend, batch_invariant=True)
    if library is not None:
        queries, lens = np.array(problem.requests, dtype=np.int64).T
        planned = PlannedAttention(library, queries, lens, problem.page_table)
        yield "flashinfer", partial(problem.attend, planned=planned)


def measure(
    library: FlashInferAttention | None,
    device: torch.device,
    left_out: dict[str, str],
    done: Collection[tuple[str, str]],
) -> Iterator[Cell]:
    """``left_out``: filled with why FlashInfer did not run, as where it finds no compiler.

    ``done``: the bases and steps that are not measured again.
    """
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    copy_us = time_cold_us([partial(torch.empty_like(source).copy_, source) for _ in range(2)])
    bandwidth = 2 * source.numel() / copy_us  # bytes a µs
    del source
    for base, (n_heads, n_kv) in HEADS.items():
        for step, requests in STEPS.items():
            if (base, step) in done:
                continue
            problems = [Problem.of(requests, n_heads, n_kv, device) for _ in range(2)]
            expected = problems[0].expected().float()
            both = zip(*(systems(problem, library) for problem in problems), strict=True)
            for (system, first), (_, second) in both:
                try:
                    found = first().float()  # type: ignore[attr-defined]
                    us = time_cold_us([first, second])
                except Exception as reason:
                    if system != "flashinfer":
                        raise
                    left_out[system] = f"{type(reason).__name__}: {reason}"[:500]
                    continue
                error = float((found - expected).abs().max())
                floor = problems[0].n_bytes / bandwidth
                speed = problems[0].flop / us / 1e6
                yield Cell(base, step, system, us, 100 * floor / us, speed, error)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="list the steps")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.dry_run or not torch.cuda.is_available():
        print(*(f"{base}: {step}" for base in HEADS for step in STEPS), sep="\n")
        if not torch.cuda.is_available():
            print("no CUDA device: nothing was measured")
        return 0
    device = torch.device("cuda")
    library, left_out = None, dict[str, str]()
    try:
        library = FlashInferAttention(device)
    except KernelUnavailable as error:
        left_out["flashinfer"] = str(error)
        print(f"flashinfer skipped: {error}")
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / f"attention-{torch.cuda.get_device_name().replace(' ', '-')}.json"
    cells = json.loads(path.read_text())["cells"] if path.exists() else []
    done = {(cell["base"], cell["step"]) for cell in cells}
    if cells:  # the last step may lack systems
        done.discard((cells[-1]["base"], cells[-1]["step"]))
        cells = [cell for cell in cells if (cell["base"], cell["step"]) in done]
    with torch.inference_mode():
        for cell in measure(library, device, left_out, done):
            print(*asdict(cell).values(), sep="\t", flush=True)
            cells.append(asdict(cell))
            document = {"without flashinfer": left_out.get("flashinfer"), "cells": cells}
            part = path.with_suffix(".part")
            part.write_text(json.dumps(document, indent=1) + "\n")
            part.replace(path)  # whole whenever it is read
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
