"""Random problems of the LoRA operator in the layout of the device pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from loraplex_kernels.formats.layout import LoraSegments, LoraTables, LoraTarget
from loraplex_kernels.reference.lora import lora_apply_reference

MIXES = ("none", "identical", "distinct", "zipf")
_ALIGNMENT = 32


@dataclass(frozen=True, slots=True)
class LoraProblem:
    tables: LoraTables
    x: Tensor  # [n_rows, in_features]
    base: Tensor  # [n_rows, Σ out_features]: out before the operator
    slots: Tensor  # int32 [n_rows, k]
    weights: Tensor | None  # float32 [n_rows, k]

    @property
    def target(self) -> LoraTarget:
        return self.tables.target

    def expected(self, segments: LoraSegments) -> Tensor:
        """Return the float64 reference of the stored values."""
        out = self.base.double().cpu()
        tables = moved(self.tables, torch.device("cpu"))
        lora_apply_reference(
            self.x.double().cpu(),
            replace(tables, storage=tables.storage.double()),
            LoraSegments(
                segments.slots.cpu(),
                segments.indptr.cpu(),
                segments.indices.cpu(),
                None if segments.weights is None else segments.weights.double().cpu(),
            ),
            out=out,
        )
        return out

    def rows(self, index: Tensor) -> LoraProblem:
        """Return the problem restricted to the rows of ``index``, in that order."""
        return replace(
            self,
            x=self.x[index],
            base=self.base[index],
            slots=self.slots[index],
            weights=None if self.weights is None else self.weights[index],
        )


def make_problem(
    *,
    in_features: int,
    out_features: tuple[int, ...],
    ranks: Sequence[Sequence[int]],
    slots: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    with_scale_and_bias: bool = False,
) -> LoraProblem:
    """Return a problem whose unused storage is NaN, so that reads beyond a page show."""
    generator = torch.Generator().manual_seed(seed)
    n_slots, n_slices = len(ranks), len(out_features)
    max_pages = max(1, max((-(-r // 16) for row in ranks for r in row), default=1))
    a_pages = torch.full((n_slots, n_slices, max_pages), -1, dtype=torch.int64)
    b_pages = a_pages.clone()
    scale = torch.full((n_slots, n_slices), -1, dtype=torch.int64)
    bias = scale.clone()
    parts: list[Tensor] = []
    size = 0

    def put(*shape: int, spread: float = 1.0) -> int:
        nonlocal size
        offset, values = size, torch.randn(shape, generator=generator).flatten() * spread
        padding = torch.full((-values.numel() % _ALIGNMENT + _ALIGNMENT,), float("nan"))
        parts.extend((values, padding))
        size += values.numel() + padding.numel()
        return offset

    for e, row in enumerate(ranks):
        for i, rank in enumerate(row):
            for page, first in enumerate(range(0, rank, 16)):
                n = min(16, rank - first)
                a_pages[e, i, page] = put(n, in_features, spread=in_features**-0.5)
                b_pages[e, i, page] = put(n, out_features[i], spread=rank**-0.5)
            if with_scale_and_bias and (e + i) % 2 == 0:
                scale[e, i] = put(out_features[i])
            if with_scale_and_bias and (e + i) % 3 == 0:
                bias[e, i] = put(out_features[i])
    table = torch.tensor(ranks, dtype=torch.int32).reshape(n_slots, n_slices)
    n_rows, k = slots.shape
    weights = None if k == 1 else torch.rand(n_rows, k, generator=generator).to(device)
    storage = (torch.cat(parts) if parts else torch.zeros(_ALIGNMENT)).to(dtype)
    target = LoraTarget("target", in_features, out_features)
    return LoraProblem(
        tables=moved(LoraTables(target, storage, table, a_pages, b_pages, scale, bias), device),
        x=torch.randn(n_rows, in_features, generator=generator).to(dtype).to(device),
        base=torch.randn(n_rows, sum(out_features), generator=generator).to(dtype).to(device),
        slots=slots.to(device),
        weights=weights,
    )


def draw_slots(mix: str, n_rows: int, k: int, n_slots: int, seed: int) -> Tensor:
    """Return int32 [n_rows, k], distinct slots in a row. Mixes but ``none`` have base rows too."""
    generator = torch.Generator().manual_seed(seed)
    if mix == "none":
        return torch.full((n_rows, k), -1, dtype=torch.int32)
    if mix == "identical":
        first = torch.zeros(n_rows, dtype=torch.int64)
    elif mix == "distinct":
        first = torch.arange(n_rows) % (n_slots + 1) - 1
    else:
        odds = 1.0 / torch.arange(1, n_slots + 2)
        first = torch.multinomial(odds.expand(max(1, n_rows), -1), 1, generator=generator)
        first = first[:n_rows, 0] - 1
    turns = torch.arange(k)
    slots = torch.where(first[:, None] < 0, -1, (first[:, None] + turns) % n_slots)
    return torch.where(turns < n_slots, slots, -1).to(torch.int32)


def tolerance(dtype: torch.dtype) -> float:
    """Return the allowed error relative to the largest value: little more than rounding."""
    return {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]


def moved(tables: LoraTables, device: torch.device) -> LoraTables:
    tensors = {f.name: getattr(tables, f.name) for f in fields(tables) if f.name != "target"}
    return replace(tables, **{name: tensor.to(device) for name, tensor in tensors.items()})
