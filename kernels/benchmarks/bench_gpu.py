"""Mixed-adapter LoRA on one GPU: ours beside cuBLAS, gather + einsum, PEFT's loop, vLLM and SGLang.

    python -m kernels.benchmarks.bench_gpu            the grid of decode and prefill steps
    python -m kernels.benchmarks.bench_gpu --dry-run  lists it; needs no GPU

Every step is captured in a CUDA graph and timed over copies of its tensors that together exceed the
L2 four times, so factors come from memory as they do in a model. Columns: µs, percent of the bytes
roofline (measured copy bandwidth), largest error against float64, bitwise repeatability. A
competitor that is not installed is skipped with a message. Results: one JSON for each device and
commit in ``kernels/benchmarks/results``, and a plot beside it.
"""

import argparse
import importlib
import importlib.metadata
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.benchmarks.gpu_workload import (
    MODEL_TARGETS,
    Workload,
    make_workload,
    n_copies_past_l2,
    time_cold_us,
)
from loraplex_kernels.formats.layout import PAGE_RANK
from loraplex_kernels.reference.lora import lora_apply_reference
from loraplex_kernels.triton.lora import lora_apply_triton

RESULTS = Path(__file__).parent / "results"
MAPPINGS = ("identical", "distinct", "uniform", "zipf")
RANKS: dict[str, tuple[int, ...]] = {"8": (8,), "16": (16,), "64": (64,), "mixed": (8, 16, 64)}

Call = Callable[..., Any]


class Skipped(Exception):
    """A competitor that cannot run a point; the message says why."""


@dataclass(frozen=True, slots=True)
class Point:
    module: str
    n_rows: int
    n_adapters: int
    ranks: str
    mapping: str

    def workload(self, seed: int, device: torch.device) -> Workload:
        cycle = RANKS[self.ranks]
        ranks = [cycle[i % len(cycle)] for i in range(self.n_adapters)]
        return make_workload(
            MODEL_TARGETS[self.module],
            ranks,
            self._slots(),
            dtype=torch.bfloat16,
            device=device,
            seed=seed,
        )

    def _slots(self) -> list[int]:
        generator = np.random.default_rng(0)
        if self.mapping == "identical":
            return [0] * self.n_rows
        if self.mapping == "distinct":
            return [row % self.n_adapters for row in range(self.n_rows)]
        odds = np.ones(self.n_adapters)
        if self.mapping == "zipf":
            odds /= np.arange(1, self.n_adapters + 1)
        chosen = generator.choice(self.n_adapters, size=self.n_rows, p=odds / odds.sum())
        return [int(slot) for slot in chosen]


@dataclass(frozen=True, slots=True)
class Measurement:
    point: Point
    system: str
    microseconds: float
    roofline_percent: float
    largest_error: float  # relative to the largest expected value
    repeats_bitwise: bool


def grid(quick: bool) -> Iterator[Point]:
    """M × distinct adapters × ranks × module × mapping, without repeating equal points."""
    n_rows = (1, 16, 128) if quick else (1, 8, 32, 128, 512, 2048)
    adapters = (1, 16) if quick else (1, 4, 16, 64)
    largest_first = sorted(MODEL_TARGETS, key=lambda name: -MODEL_TARGETS[name].in_features)
    for module, rows, count, ranks, mapping in itertools.product(
        largest_first, n_rows, adapters, RANKS, MAPPINGS
    ):
        is_trivial = count == 1 and (mapping != "identical" or ranks == "mixed")
        if count <= rows and not is_trivial and not (mapping == "identical" and count > 1):
            yield Point(module, rows, count, ranks, mapping)


def ours(work: Workload) -> Call:
    inputs = (work.x, work.tables, work.segments)
    return lambda: lora_apply_triton(*inputs, out=work.out)


def addmm_per_segment(work: Workload) -> Call:
    """cuBLAS: two products for each adapter in use and slice, over rows gathered beforehand."""
    steps: list[tuple[Tensor, Tensor, Tensor, slice]] = []
    for slot, factors in _factors(work).items():
        rows = torch.nonzero(work.slots == slot).flatten()
        first = 0
        for (a, b), width in zip(factors, work.target.out_features, strict=True):
            steps.append((rows, a.T.contiguous(), b, slice(first, first + width)))
            first += width

    def call() -> None:
        for rows, a, b, columns in steps:
            work.out[:, columns].index_add_(0, rows, work.x[rows] @ a @ b)

    return call


def peft_loop(work: Workload) -> Call:
    """PEFT's mixed batch: for each adapter, select rows, two linears, add in place."""
    layers = [
        (torch.nonzero(work.slots == slot).flatten(), factors)
        for slot, factors in _factors(work).items()
    ]

    def call() -> None:
        for rows, factors in layers:
            parts = [
                torch.nn.functional.linear(torch.nn.functional.linear(work.x[rows], a), b.T)
                for a, b in factors
            ]
            work.out[rows] += torch.cat(parts, dim=1)

    return call


def gather_and_einsum(work: Workload) -> Call:
    """Factors padded to the largest rank, gathered for every row."""
    rank = max(work.ranks)
    if work.x.shape[0] * rank * work.target.in_features * 2 > 8 << 30:
        raise Skipped("the gathered factors exceed 8 GiB")
    padded = [_padded(work, i, rank) for i in range(work.target.n_slices)]
    index = work.slots.long()

    def call() -> None:
        first = 0
        for a, b in padded:
            low = torch.einsum("mk,mrk->mr", work.x, a[index])
            work.out[:, first : first + b.shape[2]] += torch.einsum("mr,mrn->mn", low, b[index])
            first += b.shape[2]

    return call


def vllm_default(work: Workload) -> Call:
    """``lora_shrink`` and ``lora_expand`` of the installed vLLM, untuned."""
    try:
        from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink
    except ImportError as error:
        raise Skipped(f"vllm is not installed here ({error})") from error
    rank, n_rows, device = max(work.ranks), work.x.shape[0], work.x.device
    padded = [_padded(work, i, rank) for i in range(work.target.n_slices)]
    a = [a[:, None].contiguous() for a, _ in padded]
    b = [b.transpose(1, 2)[:, None].contiguous() for _, b in padded]
    meta = LoRAKernelMeta.make(len(work.ranks), n_rows, device=device)
    meta.prepare_tensors(work.slots)
    arguments = meta.meta_args(n_rows, False)
    low = torch.zeros(work.target.n_slices, n_rows, rank, dtype=torch.float32, device=device)

    def call() -> None:
        lora_shrink(work.x, a, low, *arguments, 1.0)
        lora_expand(low, b, work.out, *arguments, offset_start=0, add_inputs=True)

    return call


def sglang_csgmv(work: Workload) -> Call:
    """The chunked kernels of the installed SGLang, its default backend."""
    shrink, expand, info_type = _sglang_kernels()
    rank, device, n_slices = max(work.ranks), work.x.device, work.target.n_slices
    a = torch.zeros(
        len(work.ranks), n_slices * rank, work.target.in_features, dtype=work.x.dtype, device=device
    )
    b = torch.zeros(
        len(work.ranks), sum(work.target.out_features), rank, dtype=work.x.dtype, device=device
    )
    for slot, factors in _factors(work, used_only=False).items():
        first = 0
        for i, (a_i, b_i) in enumerate(factors):
            true = work.ranks[slot]
            a[slot, i * true : (i + 1) * true] = a_i  # slices are packed at the true rank
            b[slot, first : first + b_i.shape[1], :true] = b_i.T
            first += b_i.shape[1]
    chunk = 16 if work.x.shape[0] <= 256 else 64
    order = torch.argsort(work.slots, stable=True).to(torch.int32)
    ordered = work.slots[order.long()].tolist()
    starts = [
        i
        for slot, group in itertools.groupby(range(len(ordered)), key=lambda i: ordered[i])
        for i in list(group)[::chunk]
    ]
    info = info_type(
        use_cuda_graph=False,
        bs=work.x.shape[0],
        num_segments=len(starts),
        seg_indptr=torch.tensor([*starts, len(ordered)], dtype=torch.int32, device=device),
        weight_indices=torch.tensor([ordered[i] for i in starts], dtype=torch.int32, device=device),
        lora_ranks=torch.tensor(work.ranks, dtype=torch.int32, device=device),
        scalings=torch.ones(len(work.ranks), device=device),
        max_len=chunk,
        seg_lens=None,
        permutation=order,
    )
    offsets = torch.tensor([0, *work.target.out_features]).cumsum(0).int()
    slice_offsets = offsets.to(device)
    widest = max(work.target.out_features)

    def call() -> None:
        low = shrink(work.x, a, info, n_slices)
        expand(low, b, info, slice_offsets, widest, work.out, slice_offsets_cpu=offsets)

    return call


def _sglang_kernels() -> tuple[Call, Call, Call]:
    """Shrink, expand and the record of a batch, where SGLang 0.5 has them: they moved."""
    reasons = []
    for folder in ("sglang.kernels.ops.lora.dense", "sglang.srt.lora.triton_ops"):
        try:
            shrink = importlib.import_module(f"{folder}.chunked_sgmv_shrink")
            expand = importlib.import_module(f"{folder}.chunked_sgmv_expand")
            utils = importlib.import_module("sglang.srt.lora.utils")
        except ImportError as error:
            reasons.append(str(error))
            continue
        return (
            shrink.chunked_sgmv_lora_shrink_forward,
            expand.chunked_sgmv_lora_expand_forward,
            utils.LoRABatchInfo,
        )
    raise Skipped(f"sglang is not installed here ({'; '.join(reasons)})")


SYSTEMS: dict[str, Callable[[Workload], Call]] = {
    "loraplex": ours,
    "addmm per segment": addmm_per_segment,
    "gather + einsum": gather_and_einsum,
    "peft loop": peft_loop,
    "vllm": vllm_default,
    "sglang csgmv": sglang_csgmv,
}


def measure(point: Point, system: str, bandwidth: float, device: torch.device) -> Measurement:
    """Measure one cell. Raises Skipped."""
    build = SYSTEMS[system]
    first = point.workload(0, device)
    expected = _expected(first)
    base = first.out.clone()
    outs: list[Tensor] = []
    call = build(first)
    for _ in range(3):
        first.out.copy_(base)
        call()
        outs.append(first.out.clone())
    error = float((outs[0].double() - expected).abs().max() / expected.abs().max())
    copies = [first]
    for seed in range(1, n_copies_past_l2(first.bytes_moved, device)):
        copies.append(point.workload(seed, device))
    microseconds = time_cold_us([build(work) for work in copies])
    floor = first.bytes_moved / bandwidth * 1e6
    return Measurement(
        point=point,
        system=system,
        microseconds=microseconds,
        roofline_percent=100 * floor / microseconds,
        largest_error=error,
        repeats_bitwise=all(torch.equal(out, outs[0]) for out in outs),
    )


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a large device copy, read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    targets = [torch.empty_like(source) for _ in range(2)]
    calls = [partial(target.copy_, source) for target in targets]
    return 2 * source.numel() / time_cold_us(calls) * 1e6


def plot(measurements: list[Measurement], path: Path) -> None:
    """Speed against the fastest competitor, one dot for each point."""
    from matplotlib import pyplot

    names = [name for name in SYSTEMS if name != "loraplex"]
    times = {(m.point, m.system): m.microseconds for m in measurements}
    points = sorted(
        {m.point for m in measurements}, key=lambda p: (p.n_rows, p.n_adapters, p.module)
    )
    figure, axes = pyplot.subplots(figsize=(11, 5))
    for name in names:
        pairs = [
            (i, times[point, name] / times[point, "loraplex"])
            for i, point in enumerate(points)
            if (point, name) in times and (point, "loraplex") in times
        ]
        if pairs:
            axes.plot(*zip(*pairs, strict=True), ".", label=name, alpha=0.6)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xlabel("grid point, by rows")
    axes.set_ylabel("time over loraplex's")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry-run", action="store_true", help="list the grid and the systems")
    parser.add_argument("--quick", action="store_true", help="a smaller grid, for minutes")
    parser.add_argument("--systems", nargs="+", choices=sorted(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--modules", nargs="+", choices=sorted(MODEL_TARGETS))
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    points = [p for p in grid(arguments.quick) if p.module in (arguments.modules or MODEL_TARGETS)]
    print(f"{len(points)} points × {', '.join(arguments.systems)}")
    for package in ("vllm", "sglang"):
        print(f"{package}: {_version(package) or 'not installed, its column is skipped'}")
    if arguments.dry_run or not torch.cuda.is_available():
        for point in points:
            print(*asdict(point).values(), sep="\t")
        if not torch.cuda.is_available():
            print("no CUDA device: nothing was measured")
        return 0
    path = _result_file(arguments.output)
    measurements = _measured_before(path)
    left_out: dict[str, str] = {}
    for _ in _run(points, arguments.systems, measurements, left_out):
        _write(measurements, left_out, path)
    plot(measurements, path.with_suffix(".png"))
    print(f"wrote {path}")
    return 0


def _run(
    points: list[Point],
    systems: list[str],
    measurements: list[Measurement],
    left_out: dict[str, str],
) -> Iterator[None]:
    """Fills the last two, a point at a time: systems left out somewhere, with the reason.

    Cells that ``measurements`` has are not measured again.
    """
    done = {(cell.point, cell.system) for cell in measurements}
    device = torch.device("cuda")
    bandwidth = copy_bandwidth(device)
    print(f"{torch.cuda.get_device_name(device)}: {bandwidth / 1e12:.2f} TB/s measured by a copy")
    for point in points:
        for system in systems:
            if (point, system) in done:
                continue
            try:
                cell = measure(point, system, bandwidth, device)
            except Exception as reason:
                if system == "loraplex" and not isinstance(reason, Skipped):
                    raise
                kind = "" if isinstance(reason, Skipped) else f"{type(reason).__name__}: "
                if system not in left_out:
                    print(f"{system} skipped: {kind}{reason}")
                left_out[system] = f"{kind}{reason}"[:500]  # another's library may do anything
                continue
            measurements.append(cell)
            print(
                f"{'/'.join(map(str, asdict(point).values()))}\t{system}\t"
                f"{cell.microseconds:.1f} µs\t{cell.roofline_percent:.0f} %\t"
                f"{cell.largest_error:.1e}\t{cell.repeats_bitwise}",
                flush=True,
            )
        yield


def _result_file(folder: Path) -> Path:
    device = torch.cuda.get_device_name().replace(" ", "-")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"gpu-{device}-{commit or 'unknown'}.json"


def _measured_before(path: Path) -> list[Measurement]:
    """Return the cells of an earlier run of this device and commit."""
    if not path.exists():
        return []
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [Measurement(**{**cell, "point": Point(**cell["point"])}) for cell in cells]


def _write(measurements: list[Measurement], left_out: dict[str, str], path: Path) -> None:
    """Write the file, which is whole whenever it is read."""
    versions = {name: _version(name) for name in ("torch", "triton", "vllm", "sglang")}
    document = {
        "device": torch.cuda.get_device_name(),
        "versions": versions,
        "left_out": left_out,
        "cells": [asdict(measurement) for measurement in measurements],
    }
    partial_file = path.with_suffix(".part")
    partial_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial_file.replace(path)


def _factors(work: Workload, *, used_only: bool = True) -> dict[int, list[tuple[Tensor, Tensor]]]:
    """(A [r, K], Bᵀ [r, N]) of every slice, for each adapter (in use)."""
    used = set(work.slots.tolist()) if used_only else set(range(len(work.ranks)))
    return {
        slot: [
            (
                _read(work, work.tables.a_pages, slot, i, work.target.in_features),
                _read(work, work.tables.b_pages, slot, i, width),
            )
            for i, width in enumerate(work.target.out_features)
        ]
        for slot in sorted(used)
        if slot >= 0
    }


def _read(work: Workload, pages: Tensor, slot: int, i: int, width: int) -> Tensor:
    parts = []
    for page, first in enumerate(range(0, work.ranks[slot], PAGE_RANK)):
        n = min(PAGE_RANK, work.ranks[slot] - first)
        offset = int(pages[slot, i, page])
        parts.append(work.tables.storage[offset : offset + n * width].view(n, width))
    return torch.cat(parts)


def _padded(work: Workload, i: int, rank: int) -> tuple[Tensor, Tensor]:
    """A [L, rank, K] and Bᵀ [L, rank, N] of one slice, zero beyond each true rank."""
    pair = []
    for pages, width in (
        (work.tables.a_pages, work.target.in_features),
        (work.tables.b_pages, work.target.out_features[i]),
    ):
        shape = (len(work.ranks), rank, width)
        padded = torch.zeros(shape, dtype=work.x.dtype, device=work.x.device)
        for slot, true in enumerate(work.ranks):
            padded[slot, :true] = _read(work, pages, slot, i, width)
        pair.append(padded)
    return pair[0], pair[1]


def _expected(work: Workload) -> Tensor:
    out = work.out.double()
    tables = replace(work.tables, storage=work.tables.storage.double())
    lora_apply_reference(work.x.double(), tables, work.segments, out=out)
    return out


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
