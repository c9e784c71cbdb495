"""What the replaced modules read during one step; refilled in place by the runner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loraplex_adapter_store.plan import ModulePlan, NormPlan, StackedFactors
from loraplex_kernels.cpu.decoder import LogitsRows
from loraplex_kernels.flashinfer_attention import PlannedAttention
from loraplex_kernels.layout import LoraSegments
from loraplex_router.experts import RoutedRows

from .adapters_by_slot import AdaptersBySlot

__all__ = ["FallbackParts", "FallbackRows", "ForwardContext", "TokenRows"]


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows of an embedding or of the head, for some tokens, in place of the base's."""

    token_ids: Tensor  # int64 [n], ascending
    rows: Tensor  # [n, hidden_size]

    def put(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """``embedded`` [m, hidden_size] of ``ids`` [m], with the rows of these tokens."""
        place = torch.searchsorted(self.token_ids, ids).clamp_(max=self.token_ids.shape[0] - 1)
        is_here = (self.token_ids[place] == ids).unsqueeze(1)
        return torch.where(is_here, self.rows[place].to(embedded.dtype), embedded)


@dataclass(frozen=True, slots=True)
class FallbackParts:
    """What an adapter has beyond low-rank factors, by module name; applied to its rows in torch.

    On the device, in the model's dtype.
    """

    modules: Mapping[str, ModulePlan] = field(default_factory=dict)
    replaced_weights: Mapping[str, Tensor] = field(default_factory=dict)
    norms: Mapping[str, NormPlan] = field(default_factory=dict)
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict)
    stacked: Mapping[str, StackedFactors] = field(default_factory=dict)  # by parameter name
    # Of linears whose other parts are the pool's: [in_features], multiplied with their inputs.
    in_scales: Mapping[str, Tensor] = field(default_factory=dict)

    def changes(self, name: str) -> bool:
        """Whether the linear or embedding ``name`` is not the base's alone."""
        return name in self.modules or name in self.replaced_weights or name in self.token_rows

    @property
    def is_empty(self) -> bool:
        beside = (self.norms, self.token_rows, self.stacked, self.in_scales)
        return not (self.modules or self.replaced_weights or any(beside))


@dataclass(frozen=True, slots=True)
class FallbackRows:
    """The rows of a step whose adapter has such parts."""

    rows: Tensor  # int64 [n]
    parts: FallbackParts


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
    planned_attention: PlannedAttention | None = None  # FlashInfer's, of this step
    batch_invariant: bool = False  # of all steps: a GPU's rows have the same bits in every batch
    segments: LoraSegments | None = None  # None = no row has low-rank factors
    logits_rows: LogitsRows | None = None  # the rows whose hidden states are asked for; None = all
    fallback: tuple[FallbackRows, ...] = ()
    # int64 [n] each, by digest: of the adapters that ``fallback`` and ``routed`` are made of
    own_rows: Mapping[str, Tensor] = field(default_factory=dict)
    # MLP block or projection → the rows that route there, one element per adapter
    routed: Mapping[str, tuple[RoutedRows, ...]] = field(default_factory=dict)
    routes_projections: bool = False  # whether any of these is a projection
    by_slot: AdaptersBySlot | None = None  # of recorded steps, in place of the three above

    def clear_adapters(self) -> None:
        """All rows are the base's."""
        self.segments, self.own_rows, self.fallback, self.routed = None, {}, (), {}
        self.routes_projections, self.by_slot = False, None

    def keep(self, hidden: Tensor) -> Tensor:
        """Of all rows [T, width], those that are asked for."""
        return hidden if self.logits_rows is None else hidden[self.logits_rows.indices]
