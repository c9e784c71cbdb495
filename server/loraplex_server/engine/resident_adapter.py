"""One adapter on the device, or being loaded to it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from loraplex_kernels.pool import PoolTensors
from loraplex_router.experts import PlacedExperts, RoutedRows
from loraplex_server.model.forward_context import FallbackRows
from loraplex_server.model.routed import rows_for

from .device_parts import DeviceParts
from .layer_kind import LayerKind

__all__ = ["ResidentAdapter", "RowsBeyondThePool"]


@dataclass(frozen=True, slots=True)
class RowsBeyondThePool:
    """The rows of one adapter in a step, as what the pool's operator does not apply needs them."""

    row_ids: tuple[int, ...]
    fallback: FallbackRows | None
    routed: Mapping[str, RoutedRows]  # by MLP block or projection


@dataclass(slots=True, eq=False)
class ResidentAdapter:
    """``slots[0]`` holds the unrouted factors, the rest the experts. Engine thread only.

    What lies on the device may be read once ``is_published``.
    """

    digest: str
    slots: tuple[int, ...]
    parts: DeviceParts
    memory: PoolTensors  # that the parts lie in
    n_bytes: int  # of slots and parts
    changes_head: bool
    changes_ends: bool  # the embedding or the head, by parts that the pool does not apply
    layer_kind: LayerKind | None  # of recorded steps that compute its rows; None: none does
    load: Future[Mapping[str, PlacedExperts]]
    is_asked_for: bool  # by a request; else it is only warmed
    is_pinned: bool
    is_published: bool = False
    error: BaseException | None = None  # of a load that failed, until somebody heard it
    experts: Mapping[str, PlacedExperts] = field(default_factory=dict)  # once published
    holders: int = 0
    started_at: float = field(default_factory=time.monotonic)
    last_used: float = field(default_factory=time.monotonic)
    _rows: RowsBeyondThePool | None = None

    @property
    def needs_fallback(self) -> bool:
        """Whether it has parts that the pool's operator does not apply."""
        return bool(self.experts) or not self.parts.fallback.is_empty

    def rows(self, row_ids: tuple[int, ...], rows: Tensor) -> RowsBeyondThePool:
        """``row_ids`` ascending, ``rows`` int64 the same on the device.

        Kept from step to step: decode steps repeat.
        """
        if self._rows is None or self._rows.row_ids != row_ids:
            self._rows = RowsBeyondThePool(row_ids, self._fallback(rows), self._routed(rows))
        return self._rows

    def _fallback(self, rows: Tensor) -> FallbackRows | None:
        parts = self.parts.fallback
        return None if parts.is_empty else FallbackRows(rows, parts)

    def _routed(self, rows: Tensor) -> Mapping[str, RoutedRows]:
        return rows_for(self.experts, rows) if self.experts else {}
