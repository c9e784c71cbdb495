"""The inputs of a step for the replaced modules, refilled in place by the runner."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from loraplex_adapter_store.plan import ModulePlan, NormPlan, StackedFactors
from loraplex_kernels.formats.gate_table import GateTable
from loraplex_kernels.formats.layout import LoraSegments
from loraplex_kernels.layers.flashinfer_attention import PlannedAttention
from loraplex_kernels.lora.native_decoder import LogitsRows
from loraplex_kernels.lora.routed_mlp import RoutedPairs, route_pairs
from loraplex_router.experts.expansion import RoutedRows

_no_int64 = partial(torch.empty, 0, dtype=torch.int64)
_no_int32 = partial(torch.empty, 0, dtype=torch.int32)


@dataclass(frozen=True, slots=True)
class CapturedExperts:
    """The gates of all adapters by MLP block, for a captured step.

    Each row's adapter is read from a device tensor. Launches depend on the number of rows alone.
    """

    row_slots: Tensor  # int32 [n_rows]; -1 = no adapter
    storage: Tensor  # of the pool
    gates: Mapping[str, GateTable]

    def route(self, block: str, hidden: Tensor) -> RoutedPairs:
        """Route the rows. ``hidden`` [n_rows, hidden_size] is the input of the block."""
        return route_pairs(hidden, self.row_slots, self.storage, self.gates[block])


@dataclass(frozen=True, slots=True)
class TokenRows:
    """The rows of the embedding or the head that an adapter replaces, for some tokens."""

    token_ids: Tensor  # int64 [n], ascending
    rows: Tensor  # [n, hidden_size]

    def put(self, ids: Tensor, embedded: Tensor) -> Tensor:
        """Return ``embedded`` [m, hidden_size] with this adapter's rows in place of the base's."""
        index = torch.searchsorted(self.token_ids, ids).clamp_(max=self.token_ids.shape[0] - 1)
        is_own = (self.token_ids[index] == ids).unsqueeze(1)
        return torch.where(is_own, self.rows[index].to(embedded.dtype), embedded)


@dataclass(frozen=True, slots=True)
class FallbackParts:
    """An adapter's parts beyond low-rank factors, by module name. PyTorch applies them.

    On the device, in the model's dtype.
    """

    modules: Mapping[str, ModulePlan] = field(default_factory=dict)
    replaced_weights: Mapping[str, Tensor] = field(default_factory=dict)
    norms: Mapping[str, NormPlan] = field(default_factory=dict)
    token_rows: Mapping[str, TokenRows] = field(default_factory=dict)
    stacked: Mapping[str, StackedFactors] = field(default_factory=dict)  # by parameter name
    # Scales [in_features] of the inputs of linears whose other parts are in the pool.
    in_scales: Mapping[str, Tensor] = field(default_factory=dict)

    def changes(self, name: str) -> bool:
        """Return True if the adapter changes the linear or embedding ``name`` by these parts."""
        return name in self.modules or name in self.replaced_weights or name in self.token_rows

    @property
    def is_empty(self) -> bool:
        beside = (self.norms, self.token_rows, self.stacked, self.in_scales)
        return not (self.modules or self.replaced_weights or any(beside))


@dataclass(frozen=True, slots=True)
class FallbackRows:
    """The rows of a step that use an adapter with fallback parts."""

    rows: Tensor  # int64 [n]
    parts: FallbackParts


class BlockRows(NamedTuple):
    """The rows of a step that see the whole block of their prompt, such as an image."""

    rows: slice
    request: int  # row of ``page_table``
    first: int  # position of the first row
    end: int  # position behind the block, whose last tokens are in this step
    seen_from: int  # windows of layers hide no position from here on


@dataclass(slots=True)
class ForwardContext:
    """The inputs of a step. The runner writes them; the modules of the model only read them."""

    positions: Tensor = field(default_factory=_no_int64)  # [T]
    rope_positions: Tensor | None = None  # [3, T], where they differ from ``positions``
    slot_mapping: Tensor = field(default_factory=_no_int64)  # [T] flat KV
    page_table: Tensor = field(default_factory=lambda: _no_int32().view(0, 0))  # [n, max_pages]
    query_starts: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int32))  # [n+1]
    kv_lens: Tensor = field(default_factory=_no_int32)  # [n_requests], this step included
    # int64 [n, length] each: the rows of an encoder's texts, grouped by length
    texts: tuple[Tensor, ...] = ()
    blocks: tuple[BlockRows, ...] = ()  # of prompts with images that are not causal
    planned_attention: PlannedAttention | None = None  # of FlashInfer, for this step
    batch_invariant: bool = False  # the same bits in every batch, on a GPU
    segments: LoraSegments | None = None  # None = no row has low-rank factors
    logits_rows: LogitsRows | None = None  # rows whose hidden states are needed; None = all
    fallback: tuple[FallbackRows, ...] = ()
    # int64 [n], by digest: the rows of adapters in ``fallback`` and ``routed``
    own_rows: Mapping[str, Tensor] = field(default_factory=dict)
    # MLP block or projection → the rows that route there, one element per adapter
    routed: Mapping[str, tuple[RoutedRows, ...]] = field(default_factory=dict)
    routes_projections: bool = False  # whether any of these is a projection
    captured_experts: CapturedExperts | None = None  # of captured steps, in place of ``routed``

    def clear_adapters(self) -> None:
        """Removes all adapters: every row then uses the base alone."""
        self.segments, self.own_rows, self.fallback, self.routed = None, {}, (), {}
        self.routes_projections, self.captured_experts = False, None

    def keep(self, hidden: Tensor) -> Tensor:
        """Return the needed rows of [T, width], see ``logits_rows``."""
        return hidden if self.logits_rows is None else hidden[self.logits_rows.indices]
