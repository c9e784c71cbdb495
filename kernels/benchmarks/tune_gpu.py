"""Measures the tile choices of the LoRA launches on a GPU, beside the rule's own.

    python -m kernels.benchmarks.tune_gpu        writes results/tiles_sm<capability>.json

Each row of the file has the fastest choice and its time, and the choice and time of
``loraplex_kernels.triton.launch_choices``, which is to be corrected by hand. Choices change speed,
never bits.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.benchmarks.gpu_workload import (
    MODEL_TARGETS,
    Workload,
    make_workload,
    n_copies_past_l2,
    time_cold_us,
)
from loraplex_kernels.formats.layout import LoraTarget
from loraplex_kernels.triton.expand import lora_expand
from loraplex_kernels.triton.launch_choices import (
    ExpandChoice,
    ShrinkChoice,
    expand_choice,
    shrink_choice,
)
from loraplex_kernels.triton.shrink import lora_shrink

RESULTS = Path(__file__).parent / "results"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
RANKS = (16, 64, 256)
ROWS = (16, 64, 256, 1024, 4096)
SHRINK = [
    ShrinkChoice(*choice)
    for choice in itertools.product((False, True), (1, 2, 4), (2, 4, 8), (2, 3, 4))
]
EXPAND = [
    ExpandChoice(*choice)
    for choice in itertools.product((16, 32), (32, 64, 128, 256), (2, 4, 8), (1, 2, 3))
]

Run = Callable[[], object]


def tune(name: str, rank: int, n_rows: int, dtype: str, device: torch.device) -> dict[str, Any]:
    """Measure one problem: takes seconds."""
    copies = _copies(MODEL_TARGETS[name], rank, n_rows, DTYPES[dtype], device)
    target, itemsize = copies[0].target, copies[0].x.element_size()
    shrink = shrink_choice(n_rows, target.in_features, -(-rank // 16), itemsize)
    expand = expand_choice(n_rows, itemsize)
    planes = [_shrink(work, shrink) for work in copies]
    return {
        "target": name,
        "rank": rank,
        "rows": n_rows,
        "dtype": dtype,
        "shrink": _compare(SHRINK, shrink, lambda c: [partial(_shrink, w, c) for w in copies]),
        "expand": _compare(
            EXPAND,
            expand,
            lambda c: [partial(_expand, w, p, c) for w, p in zip(copies, planes, strict=True)],
        ),
    }


def _copies(
    target: LoraTarget, rank: int, n_rows: int, dtype: torch.dtype, device: torch.device
) -> list[Workload]:
    n_adapters = min(16, n_rows)
    slots = [row % n_adapters for row in range(n_rows)]
    make = partial(make_workload, target, [rank] * n_adapters, slots, dtype=dtype, device=device)
    first = make()
    n_copies = n_copies_past_l2(first.bytes_moved, device)
    return [first, *(make(seed=seed) for seed in range(1, n_copies))]


def _shrink(work: Workload, choice: ShrinkChoice) -> Tensor:
    inputs = (work.x, work.tables, work.segments)
    return lora_shrink(*inputs, choice=choice)


def _expand(work: Workload, planes: Tensor, choice: ExpandChoice) -> None:
    inputs = (work.x, work.tables, work.segments)
    lora_expand(planes, *inputs, choice=choice, out=work.out)


def _compare(
    choices: Sequence[Any], rule: Any, calls_of: Callable[[Any], list[Run]]
) -> dict[str, Any]:
    times: dict[Any, float] = {}
    for choice in dict.fromkeys([rule, *choices]):
        try:
            times[choice] = time_cold_us(calls_of(choice))
        except RuntimeError as error:  # too much shared memory or too many registers
            print(f"{choice}: {error}", file=sys.stderr)
    best = min(times, key=lambda choice: times[choice])
    return {
        "best": asdict(best),
        "best_us": times[best],
        "rule": asdict(rule),
        "rule_us": times.get(rule),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=["bf16", "fp16"])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("measuring tiles needs a CUDA device", file=sys.stderr)
        return 1
    device = torch.device("cuda")
    major, minor = torch.cuda.get_device_capability(device)
    path = RESULTS / f"tiles_sm{major}{minor}.json"
    rows = []
    for dtype, rank, n_rows, name in itertools.product(
        arguments.dtypes, RANKS, ROWS, MODEL_TARGETS
    ):
        rows.append(tune(name, rank, n_rows, dtype, device))
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {len(rows)} rows to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
