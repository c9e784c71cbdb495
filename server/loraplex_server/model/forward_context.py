"""What the replaced modules read during one step; refilled in place by the runner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loraplex_adapter_store.plan import ModulePlan
from loraplex_kernels.cpu.decoder import LogitsRows
from loraplex_kernels.layout import LoraSegments
from loraplex_router.experts import RoutedRows

__all__ = ["FallbackRows", "ForwardContext"]


@dataclass(frozen=True, slots=True)
class FallbackRows:
    """Rows whose adapter has parts beyond low-rank factors, applied module by module in torch."""

    rows: Tensor  # int64 [n]
    modules: Mapping[str, ModulePlan]  # on the device, in the model's dtype
    replaced_weights: Mapping[str, Tensor]  # module name → replacing weight


@dataclass(slots=True)
class ForwardContext:
    """Owned by the runner; the modules of the model hold the one instance and only read it."""

    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))  # [T]
    slot_mapping: Tensor = field(
        default_factory=lambda: torch.empty(0, dtype=torch.int64)
    )  # [T] flat KV
    page_table: Tensor = field(
        default_factory=lambda: torch.empty(0, 0, dtype=torch.int32)
    )  # [n_requests, max_pages]
    query_starts: Tensor = field(
        default_factory=lambda: torch.zeros(1, dtype=torch.int32)
    )  # [n_requests + 1]
    kv_lens: Tensor = field(
        default_factory=lambda: torch.empty(0, dtype=torch.int32)
    )  # [n_requests], this step included
    segments: LoraSegments | None = None  # None = no row has low-rank factors
    logits_rows: LogitsRows | None = None  # the rows whose hidden states are asked for; None = all
    fallback: tuple[FallbackRows, ...] = ()
    # MLP block or projection → the rows that route there, one element per adapter
    routed: Mapping[str, tuple[RoutedRows, ...]] = field(default_factory=dict)
    routes_projections: bool = False  # whether any of these is a projection

    def keep(self, hidden: Tensor) -> Tensor:
        """Of all rows [T, width], those that are asked for."""
        return (
            hidden
            if self.logits_rows is None
            else hidden[self.logits_rows.indices.to(hidden.device)]
        )
