"""An adapter that is resident on the device or being loaded."""

import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from loraplex_router.experts.expansion import PlacedExperts, RoutedRows
from loraplex_server.model.layers.forward_context import FallbackRows
from loraplex_server.model.layers.routed import rows_for

from .adapter_memory import AdapterMemory
from .layer_kind import LayerKind


@dataclass(frozen=True, slots=True)
class RowsBeyondThePool:
    """An adapter's rows of a step, for the parts that the LoRA kernels do not apply."""

    row_ids: tuple[int, ...]
    fallback: FallbackRows | None
    routed: Mapping[str, RoutedRows]  # by MLP block or projection


@dataclass(slots=True, eq=False)
class ResidentAdapter:
    """An adapter and its device memory, which may be read once published. Engine thread only."""

    digest: str
    memory: AdapterMemory
    changes_head: bool
    changes_ends: bool  # True if parts beyond the pool change the embedding or the head
    layer_kind: LayerKind | None  # of captured layers for its rows; None: they run eagerly
    load: Future[Mapping[str, PlacedExperts]]
    is_requested: bool = False  # by a request; else it is only warmed
    is_published: bool = False
    error: BaseException | None = None  # of a failed load, until it is reported
    experts: Mapping[str, PlacedExperts] = field(default_factory=dict)  # once published
    holders: int = 0
    started_at: float = field(default_factory=time.monotonic)
    load_s: float = 0.0  # once published
    last_used: float = field(default_factory=time.monotonic)
    _rows: RowsBeyondThePool | None = None

    @property
    def slot(self) -> int:
        """The slot of the unrouted factors."""
        return self.memory.slots[0]

    @property
    def has_settled(self) -> bool:
        """True once its load is published or has failed, which takes place between steps."""
        return self.is_published or self.error is not None

    @property
    def n_bytes(self) -> int:
        return self.memory.n_bytes

    @property
    def needs_fallback(self) -> bool:
        """True if it has parts that the LoRA kernels do not apply."""
        return bool(self.experts) or not self.memory.parts.fallback.is_empty

    def publish(self, experts: Mapping[str, PlacedExperts]) -> None:
        """Marks the adapter as readable and stamps the duration of its load."""
        self.experts, self.is_published = experts, True
        self.load_s = time.monotonic() - self.started_at

    def rows(self, row_ids: tuple[int, ...], rows: Tensor) -> RowsBeyondThePool:
        """Return the adapter's rows of a step. Cached, since decode steps repeat.

        ``row_ids`` are ascending; ``rows`` int64 has them on the device.
        """
        if self._rows is None or self._rows.row_ids != row_ids:
            parts = self.memory.parts.fallback
            fallback = None if parts.is_empty else FallbackRows(rows, parts)
            routed = rows_for(self.experts, rows) if self.experts else {}
            self._rows = RowsBeyondThePool(row_ids, fallback, routed)
        return self._rows
