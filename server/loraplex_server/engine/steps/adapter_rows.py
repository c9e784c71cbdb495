"""The rows of each adapter in a step, for the kernels and the model's modules."""

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.formats.host_copy import move_together
from loraplex_kernels.formats.layout import LoraSegments
from loraplex_kernels.lora.segments import build_segments, group_runs
from loraplex_router.experts.expansion import RoutedRows
from loraplex_server.engine.adapters.device_pool import DevicePool
from loraplex_server.engine.adapters.layer_kind import LayerKind
from loraplex_server.engine.adapters.resident_adapter import RowsBeyondThePool
from loraplex_server.engine.requests.request import Request
from loraplex_server.model.layers.forward_context import FallbackRows, ForwardContext

from .forward_batch import ForwardBatch


class AdapterRows:
    """Binds the pool's adapters to rows. The rows of each chunk are contiguous, in order.

    Engine thread only.
    """

    def __init__(self, adapters: DevicePool, device: torch.device) -> None:
        self._adapters = adapters
        self._projections = adapters.packer.capabilities.linears
        self._device = device
        self._segments_key: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        self._last_segments: LoraSegments | None = None  # on a GPU, since decode steps repeat

    def slot(self, digest: str) -> int:
        """Return the slot of an adapter; −1 for the base."""
        return self._adapters.resident(digest).slot if digest else -1

    def layer_kind(self, digest: str) -> LayerKind | None:
        """Return the kind of captured layers that computes an adapter's rows, if any."""
        return self._adapters.resident(digest).layer_kind if digest else LayerKind.BASE

    def changes_head(self, request: Request) -> bool:
        """Return True if the request's adapter changes the output head."""
        digest = request.sampling_digest
        return bool(digest) and self._adapters.resident(digest).changes_head

    def prefix_embeddings(self, request: Request) -> Tensor | None:
        """Return the embeddings [n_virtual, hidden_size] of virtual tokens, if there are any."""
        prefix = self._adapters.prefix(request.adapter_digest)
        return None if prefix is None else prefix.embeddings

    def own_rows(
        self, digests: Sequence[str], n_rows: Sequence[int], *, at_ends_alone: bool = False
    ) -> dict[str, list[int]]:
        """Return the rows of each adapter with parts beyond the LoRA kernels, by digest.

        ``digests``: the adapter of each run of rows; empty for the base.
        ``at_ends_alone``: only adapters that change the embedding or the head, for captured layers.
        """
        rows: dict[str, list[int]] = {}
        for digest in dict.fromkeys(filter(None, digests)):
            adapter = self._adapters.resident(digest)
            if adapter.changes_ends if at_ends_alone else adapter.needs_fallback:
                rows[digest] = []
        end = 0
        for digest, n in zip(digests, n_rows, strict=True) if rows else ():
            first, end = end, end + n
            if digest in rows:
                rows[digest].extend(range(first, end))
        return rows

    def bind(
        self,
        step: ForwardContext,
        digests: Sequence[str],
        batch: ForwardBatch,
        own_rows: Mapping[str, Sequence[int]],
    ) -> None:
        """Binds the adapters of ``batch`` to the step. ``own_rows``: from ``self.own_rows``."""
        n_rows = [rows.stop - rows.start for rows in batch.chunk_rows]
        step.segments = self.segments(digests, n_rows, batch.row_slots)
        step.captured_experts = None
        beyond = self._beyond_the_pool(own_rows, batch.own_rows)
        step.own_rows = batch.own_rows
        step.fallback = _fallback(beyond)
        step.routed = _routed(beyond)
        step.routes_projections = not self._projections.isdisjoint(step.routed)

    def bind_embedding(
        self,
        step: ForwardContext,
        own_rows: Mapping[str, Sequence[int]],
        on_device: Mapping[str, Tensor],
    ) -> None:
        """Binds the adapters to the embedding only, since the layers are captured."""
        step.fallback = _fallback(self._beyond_the_pool(own_rows, on_device))

    def of_each(
        self, requests: Sequence[Request]
    ) -> tuple[LoraSegments | None, tuple[FallbackRows, ...]]:
        """Return the segments and fallback rows of the head, where row i is ``requests[i]``."""
        each, digests = [1] * len(requests), [request.sampling_digest for request in requests]
        own = self.own_rows(digests, each)
        rows = [np.array(part, dtype=np.int64) for part in own.values()]
        on_device = dict(zip(own, move_together(rows, self._device), strict=True))
        return self.segments(digests, each), _fallback(self._beyond_the_pool(own, on_device))

    def of_one(
        self, digest: str, n_rows: int
    ) -> tuple[LoraSegments | None, tuple[FallbackRows, ...]]:
        """Return the segments and fallback rows of ``n_rows`` rows of one adapter."""
        parts = self._adapters.resident(digest).memory.parts.fallback
        rows = torch.arange(n_rows, device=self._device)
        fallback = () if parts.is_empty else (FallbackRows(rows, parts),)
        return self.segments([digest], [n_rows]), fallback

    def segments(
        self,
        digests: Sequence[str],
        n_rows: Sequence[int],
        row_slots: Tensor | None = None,  # if they are on the device already
    ) -> LoraSegments | None:
        """Return the rows by adapter slot; None if all rows are the base's."""
        slots = tuple(map(self.slot, digests))
        if all(slot < 0 for slot in slots):
            return None
        if self._device.type == "cpu":
            return _cpu_segments(slots, tuple(n_rows))
        key = (slots, tuple(n_rows))
        if self._segments_key != key or self._last_segments is None:
            if row_slots is None:
                repeated = np.repeat(np.array(slots, dtype=np.int32), n_rows)
                (row_slots,) = move_together([repeated], self._device)
            n_slots = len({slot for slot in slots if slot >= 0})
            self._segments_key = key
            self._last_segments = build_segments(row_slots, n_slots=n_slots)
        return self._last_segments

    def _beyond_the_pool(
        self, own_rows: Mapping[str, Sequence[int]], on_device: Mapping[str, Tensor]
    ) -> list[RowsBeyondThePool]:
        """Return the rows of each adapter with parts beyond the LoRA kernels."""
        return [
            self._adapters.resident(digest).rows(tuple(rows), on_device[digest])
            for digest, rows in own_rows.items()
        ]


def _fallback(beyond: Sequence[RowsBeyondThePool]) -> tuple[FallbackRows, ...]:
    return tuple(rows.fallback for rows in beyond if rows.fallback is not None)


def _routed(beyond: Sequence[RowsBeyondThePool]) -> dict[str, tuple[RoutedRows, ...]]:
    """Return the routed rows by MLP block or projection."""
    routed: dict[str, tuple[RoutedRows, ...]] = {}
    for rows in beyond:
        for site, part in rows.routed.items():
            routed[site] = (*routed.get(site, ()), part)
    return routed


@functools.lru_cache(maxsize=4)  # decode steps repeat
def _cpu_segments(slots: tuple[int, ...], n_rows: tuple[int, ...]) -> LoraSegments:
    return group_runs(slots, n_rows)
