"""Random LoRA steps that are laid out as in the pool, and a timer that keeps the L2 cache cold."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loraplex_kernels.formats.layout import (
    NO_PAGE,
    PAGE_RANK,
    DeviceSegments,
    LoraTables,
    LoraTarget,
)
from loraplex_kernels.triton.group_rows import build_device_segments

_ALIGNMENT = 32  # elements; 64 bytes of bf16

MODEL_TARGETS: dict[str, LoraTarget] = {
    "SmolLM2-135M qkv": LoraTarget("qkv", 576, (576, 192, 192)),
    "SmolLM2-135M o": LoraTarget("o", 576, (576,)),
    "SmolLM2-135M gate_up": LoraTarget("gate_up", 576, (1536, 1536)),
    "SmolLM2-135M down": LoraTarget("down", 1536, (576,)),
    "Llama-3.1-8B qkv": LoraTarget("qkv", 4096, (4096, 1024, 1024)),
    "Llama-3.1-8B o": LoraTarget("o", 4096, (4096,)),
    "Llama-3.1-8B gate_up": LoraTarget("gate_up", 4096, (14336, 14336)),
    "Llama-3.1-8B down": LoraTarget("down", 14336, (4096,)),
}


@dataclass(frozen=True, slots=True)
class Workload:
    target: LoraTarget
    x: Tensor  # [n_rows, in_features]
    out: Tensor  # [n_rows, Σ out_features]
    tables: LoraTables
    slots: Tensor  # int32 [n_rows]: the adapter of each row, -1 = none
    ranks: tuple[int, ...]  # of each adapter
    segments: DeviceSegments

    @property
    def bytes_moved(self) -> int:
        """The least bytes a kernel moves: each factor in use and x once, out twice."""
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
    """Make random adapters of these ``ranks``, and one row for each of ``slots``."""
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
        tables=LoraTables(
            target,
            normal(size) * target.in_features**-0.5,
            table.to(device),
            a_pages.to(device),
            b_pages.to(device),
            absent,
            absent.clone(),
        ),
        slots=row_slots,
        ranks=tuple(ranks),
        segments=build_device_segments(row_slots, n_slots=len(ranks)),
    )


def n_copies_past_l2(n_bytes: int, device: torch.device) -> int:
    """The copies of a working set that exceed the L2 cache four times."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(64, -(-4 * l2 // max(1, n_bytes))))


def time_cold_us(calls: Sequence[Callable[[], object]]) -> float:
    """Return the median µs of one call. ``calls`` do the same work on different memory.

    One CUDA graph replays all calls, so each call must be capturable. Needs a CUDA device.
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
    for _ in range(20):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)
