"""Random steps to time kernels on, laid out as in the pool, and a timer that keeps the L2 cold."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_kernels.layout import NO_PAGE, PAGE_RANK, LoraTables, LoraTarget

from .routing import DeviceSegments, build_device_segments

__all__ = ["Workload", "make_workload", "n_copies_past_l2", "time_cold_us"]

_ALIGNMENT = 32  # elements; 64 bytes of bf16


@dataclass(frozen=True, slots=True)
class Workload:
    target: LoraTarget
    x: Tensor  # [n_rows, in_features]
    out: Tensor  # [n_rows, Σ out_features]
    storage: Tensor
    tables: LoraTables
    slots: Tensor  # int32 [n_rows]; the adapter of each row, -1 = none
    ranks: tuple[int, ...]  # of each adapter
    segments: DeviceSegments

    @property
    def bytes_moved(self) -> int:
        """Each factor in use once, x once, out in and out: what no kernel can go below."""
        used = sorted({slot for slot in self.slots.tolist() if slot >= 0})
        width = self.target.in_features * self.target.n_slices + sum(self.target.out_features)
        factors = sum(self.ranks[slot] for slot in used) * width
        n_rows = int((self.slots >= 0).sum())
        rows = n_rows * (self.target.in_features + 2 * sum(self.target.out_features))
        return int((factors + rows) * self.x.element_size())


def make_workload(
    target: LoraTarget,
    ranks: Sequence[int],
    slots: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
) -> Workload:
    """One adapter for each of ``ranks`` and one row for each of ``slots``; random values."""
    n_pages = [-(-rank // PAGE_RANK) for rank in ranks]
    shape = (len(ranks), target.n_slices, max(n_pages))
    a_pages, b_pages = (torch.full(shape, NO_PAGE, dtype=torch.int64) for _ in range(2))
    size = 0
    for slot, rank in enumerate(ranks):
        for i, width in enumerate(target.out_features):
            for pages, columns in ((a_pages, target.in_features), (b_pages, width)):
                for page in range(n_pages[slot]):
                    pages[slot, i, page] = size
                    size += min(PAGE_RANK, rank - page * PAGE_RANK) * columns
                    size += -size % _ALIGNMENT
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        values = torch.randn(sizes, generator=generator, dtype=torch.float32, device=device)
        return values.to(dtype)

    absent = torch.full(shape[:2], NO_PAGE, dtype=torch.int64, device=device)
    table = torch.tensor(ranks, dtype=torch.int32)[:, None].expand(shape[:2]).contiguous()
    row_slots = torch.tensor(slots, dtype=torch.int32, device=device)
    return Workload(
        target=target,
        x=normal(len(slots), target.in_features),
        out=normal(len(slots), sum(target.out_features)),
        storage=normal(size) * target.in_features**-0.5,
        tables=LoraTables(
            table.to(device), a_pages.to(device), b_pages.to(device), absent, absent.clone()
        ),
        slots=row_slots,
        ranks=tuple(ranks),
        segments=build_device_segments(row_slots, n_slots=len(ranks)),
    )


def n_copies_past_l2(n_bytes: int, device: torch.device) -> int:
    """Copies of a working set to rotate through, so that none is in the L2 when its turn comes."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(64, -(-4 * l2 // max(1, n_bytes))))


def time_cold_us(calls: Sequence[Callable[[], object]], *, n_repeats: int = 20) -> float:
    """Median µs of one call. ``calls`` do the same on different memory; one graph replays them all.

    Needs a CUDA device; each call must be capturable in a CUDA graph.
    """
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    times: list[float] = []
    for _ in range(n_repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)
