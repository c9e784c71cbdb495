"""Which rows of a step each adapter has, as the kernels and the model's modules need them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from loraplex_kernels.layout import LoraSegments
from loraplex_kernels.segments import build_segments, group_runs
from loraplex_router.experts import RoutedRows
from loraplex_server.model.forward_context import FallbackRows, ForwardContext

from .device_pool import DevicePool
from .host_copy import move_together
from .layer_kind import LayerKind
from .request import Request
from .resident_adapter import RowsBeyondThePool

__all__ = ["AdapterRows"]


class AdapterRows:
    """Reads the pool of adapters. Engine thread only. ``n_rows[i]`` neighbours are of request i."""

    def __init__(
        self, adapters: DevicePool, projections: frozenset[str], device: torch.device
    ) -> None:
        """``projections``: the linears of the base that may have experts of their own."""
        self._adapters = adapters
        self._projections = projections
        self._device = device
        self._segments_of: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
        self._known_segments: LoraSegments | None = None  # of a GPU: decode steps repeat

    def slot(self, request: Request) -> int:
        """−1 for the base's rows."""
        digest = request.adapter_digest
        return self._adapters.resident(digest).slots[0] if digest else -1

    def layer_kind(self, request: Request) -> LayerKind | None:
        """What its rows ask of recorded layers; None: no such layers compute them."""
        digest = request.adapter_digest
        return self._adapters.resident(digest).layer_kind if digest else LayerKind.BASE

    def changes_head(self, request: Request) -> bool:
        digest = request.adapter_digest
        return bool(digest) and self._adapters.resident(digest).changes_head

    def prefix_embeddings(self, request: Request) -> Tensor | None:
        """[n_virtual, hidden_size] of its adapter's virtual tokens, if they are embeddings."""
        prefix = self._adapters.prefix(request.adapter_digest)
        return None if prefix is None else prefix.embeddings

    def own_rows(
        self, requests: Sequence[Request], n_rows: Sequence[int], *, at_ends_alone: bool = False
    ) -> dict[str, list[int]]:
        """Of each adapter that does more than the pool's operator, by digest, ascending.

        ``at_ends_alone``: more at the embedding or the head, as recorded layers do the rest.
        """
        adapters = self._adapters
        digests = dict.fromkeys(r.adapter_digest for r in requests if r.adapter_digest)
        found: dict[str, list[int]] = {
            d: []
            for d in digests
            if (
                adapters.resident(d).changes_ends
                if at_ends_alone
                else adapters.resident(d).needs_fallback
            )
        }
        if not found:
            return found
        end = 0
        for request, n in zip(requests, n_rows, strict=True):
            first, end = end, end + n
            if request.adapter_digest in found:
                found[request.adapter_digest].extend(range(first, end))
        return found

    def bind(
        self,
        step: ForwardContext,
        requests: Sequence[Request],
        n_rows: Sequence[int],
        row_slots: Tensor | None,
        own_rows: Mapping[str, Sequence[int]],
        on_device: Mapping[str, Tensor],
    ) -> None:
        """The step's layers apply the adapters of these rows.

        ``row_slots`` and ``on_device`` (``own_rows`` as tensors) came with the step's inputs.
        """
        step.segments, step.by_slot = self.segments(requests, n_rows, row_slots), None
        beyond = self._beyond_the_pool(own_rows, on_device)
        step.own_rows = on_device
        step.fallback = _fallback(beyond)
        step.routed = _routed(beyond)
        step.routes_projections = not self._projections.isdisjoint(step.routed)

    def bind_embedding(
        self,
        step: ForwardContext,
        own_rows: Mapping[str, Sequence[int]],
        on_device: Mapping[str, Tensor],
    ) -> None:
        """As ``bind`` for the embedding alone: the layers are recorded."""
        step.fallback = _fallback(self._beyond_the_pool(own_rows, on_device))

    def of_each(
        self, requests: Sequence[Request]
    ) -> tuple[LoraSegments | None, tuple[FallbackRows, ...]]:
        """Row i is of ``requests[i]``: what the head has to add to its outputs."""
        each = [1] * len(requests)
        own = self.own_rows(requests, each)
        rows = [np.array(of_one, dtype=np.int64) for of_one in own.values()]
        on_device = dict(zip(own, move_together(rows, self._device), strict=True))
        return self.segments(requests, each), _fallback(self._beyond_the_pool(own, on_device))

    def segments(
        self,
        requests: Sequence[Request],
        n_rows: Sequence[int],
        row_slots: Tensor | None = None,  # on the device, if they are there already
    ) -> LoraSegments | None:
        """Rows by slot; None when every row is the base's."""
        slots = tuple(self.slot(request) for request in requests)
        if all(slot < 0 for slot in slots):
            return None
        if self._device.type == "cpu":
            return _cpu_segments(slots, tuple(n_rows))
        key = (slots, tuple(n_rows))
        if self._segments_of != key or self._known_segments is None:
            if row_slots is None:
                repeated = np.repeat(np.array(slots, dtype=np.int32), n_rows)
                (row_slots,) = move_together([repeated], self._device)
            self._segments_of, self._known_segments = key, build_segments(row_slots)
        return self._known_segments

    def _beyond_the_pool(
        self, own_rows: Mapping[str, Sequence[int]], on_device: Mapping[str, Tensor]
    ) -> list[RowsBeyondThePool]:
        """One element for each adapter that does more than the pool's operator."""
        return [
            self._adapters.resident(digest).rows(tuple(rows), on_device[digest])
            for digest, rows in own_rows.items()
        ]


def _fallback(beyond: Sequence[RowsBeyondThePool]) -> tuple[FallbackRows, ...]:
    return tuple(one.fallback for one in beyond if one.fallback is not None)


def _routed(beyond: Sequence[RowsBeyondThePool]) -> dict[str, tuple[RoutedRows, ...]]:
    """By MLP block or projection: the rows whose adapter routes there."""
    routed: dict[str, tuple[RoutedRows, ...]] = {}
    for one in beyond:
        for place, part in one.routed.items():
            routed[place] = (*routed.get(place, ()), part)
    return routed


@functools.lru_cache(maxsize=4)  # decode steps repeat
def _cpu_segments(slots: tuple[int, ...], n_rows: tuple[int, ...]) -> LoraSegments:
    return group_runs(slots, n_rows)
