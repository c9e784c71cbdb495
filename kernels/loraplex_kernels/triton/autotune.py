"""``python -m loraplex_kernels.triton.autotune``: measures tile choices and writes the table.

Runs on a CUDA device only. Replaces the rows of that device's capability in the table and keeps the
others. Choices change speed, never bits, so a table may be written at any time.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from loraplex_kernels.layout import LoraTarget

from .arithmetic import reduction
from .expand import lora_expand
from .fused import lora_fused
from .launches import MODEL_TARGETS
from .shrink import lora_shrink, planes_shape
from .tuning import (
    ExpandChoice,
    FusedChoice,
    ShrinkChoice,
    TuningKey,
    TuningRow,
    TuningTable,
    default_table,
)
from .workload import Workload, make_workload, n_copies_past_l2, time_cold_us

__all__ = ["tune"]

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_RANKS = (16, 64, 256)
_ROWS = (16, 64, 256, 1024, 4096)
_ANY = 10**9

C = TypeVar("C", ShrinkChoice, ExpandChoice, FusedChoice)

_SHRINK = [
    ShrinkChoice(serial, programs, warps, stages)
    for serial, programs, warps, stages in itertools.product(
        (False, True), (1, 2, 4), (2, 4, 8), (2, 3, 4)
    )
]
_EXPAND = [
    ExpandChoice(block_m, block_n, warps, stages)
    for block_m, block_n, warps, stages in itertools.product(
        (16, 32), (32, 64, 128, 256), (2, 4, 8), (1, 2, 3)
    )
]
_FUSED = [
    FusedChoice(True, block_n, warps, stages)
    for block_n, warps, stages in itertools.product((32, 64, 128), (2, 4, 8), (2, 3))
]


def tune(dtype: str, device: torch.device) -> list[TuningRow]:
    """The best rows of one dtype on ``device``; takes minutes."""
    major, minor = torch.cuda.get_device_capability(device)
    rows: list[TuningRow] = []
    for rank, n_rows in itertools.product(_RANKS, _ROWS):
        bound = _ANY if n_rows == _ROWS[-1] else n_rows
        for target in MODEL_TARGETS.values():
            copies = _copies(target, rank, n_rows, dtype, device)
            key = partial(TuningKey, capability=major * 10 + minor, dtype=dtype, rank=rank)
            n_out = sum(target.out_features)
            shrink, shrink_us = _best(
                (choice, [_shrink(work, choice) for work in copies]) for choice in _SHRINK
            )
            rows.append(TuningRow(key("shrink", width=target.in_features, rows=bound), shrink))
            expand, expand_us = _best(
                (choice, [_expand(work, choice, serial=shrink.serial) for work in copies])
                for choice in _EXPAND
            )
            rows.append(TuningRow(key("expand", width=n_out, rows=bound), expand))
            fused, fused_us = _best(
                (choice, [_fused(work, choice) for work in copies]) for choice in _FUSED
            )
            wins = fused_us < shrink_us + expand_us
            choice = FusedChoice(wins, fused.block_n, fused.num_warps, fused.num_stages)
            rows.append(TuningRow(key("fused", width=target.in_features, rows=bound), choice))
            print(f"{dtype} r{rank} {n_rows} rows {target}: {shrink_us:.1f} + {expand_us:.1f} µs")
    return _one_row_a_key(rows)


def _copies(
    target: LoraTarget, rank: int, n_rows: int, dtype: str, device: torch.device
) -> list[Workload]:
    n_adapters = min(16, n_rows)
    make = partial(
        make_workload,
        target,
        [rank] * n_adapters,
        [row % n_adapters for row in range(n_rows)],
        dtype=_DTYPES[dtype],
        device=device,
    )
    first = make()
    return [first, *(make(seed=i) for i in range(1, n_copies_past_l2(first.bytes_moved, device)))]


def _planes(work: Workload, *, serial: bool) -> Tensor:
    cut = reduction(work.target.in_features, work.x.element_size())
    n_planes = 1 if serial else cut.n_chunks
    shape = planes_shape(work.target, work.tables, work.segments, n_planes=n_planes)
    return torch.zeros(shape, device=work.x.device)


def _shrink(work: Workload, choice: ShrinkChoice) -> Callable[[], object]:
    planes = _planes(work, serial=choice.serial)
    return lambda: lora_shrink(
        work.x, work.storage, work.target, work.tables, work.segments, choice, planes=planes
    )


def _expand(work: Workload, choice: ExpandChoice, *, serial: bool) -> Callable[[], object]:
    planes = _planes(work, serial=serial)
    return lambda: lora_expand(
        planes, work.x, work.storage, work.target, work.tables, work.segments, choice, out=work.out
    )


def _fused(work: Workload, choice: FusedChoice) -> Callable[[], object]:
    return lambda: lora_fused(
        work.x, work.storage, work.target, work.tables, work.segments, choice, out=work.out
    )


def _best(candidates: Iterator[tuple[C, list[Callable[[], object]]]]) -> tuple[C, float]:
    """The fastest candidate that fits the device."""
    times: list[tuple[float, C]] = []
    for choice, calls in candidates:
        try:
            times.append((time_cold_us(calls), choice))
        except RuntimeError as error:  # too much shared memory or too many registers
            print(f"{choice}: {error}", file=sys.stderr)
    microseconds, choice = min(times, key=lambda pair: pair[0])
    return choice, microseconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("tuning.json"))
    parser.add_argument("--dtypes", nargs="+", choices=sorted(_DTYPES), default=["bf16", "fp16"])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("autotuning needs a CUDA device; the table in the package stays", file=sys.stderr)
        return 1
    device = torch.device("cuda")
    tuned = [row for dtype in arguments.dtypes for row in tune(dtype, device)]
    replaced = {(row.key.capability, row.key.dtype) for row in tuned}
    kept = [
        row for row in default_table().rows if (row.key.capability, row.key.dtype) not in replaced
    ]
    arguments.output.write_text(TuningTable([*kept, *tuned]).dump(), encoding="utf-8")
    print(f"wrote {len(kept) + len(tuned)} rows to {arguments.output}")
    return 0


def _one_row_a_key(rows: list[TuningRow]) -> list[TuningRow]:
    """Targets of one width share a key; the first of them stands."""
    found: dict[TuningKey, TuningRow] = {}
    for row in rows:
        found.setdefault(row.key, row)
    return list(found.values())


if __name__ == "__main__":
    sys.exit(main())
