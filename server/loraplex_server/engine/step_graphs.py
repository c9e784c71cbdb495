"""The layers of a step as CUDA graphs: a few launches instead of a dozen for every layer.

    embed ─▶ [layers, attention included] ─▶ head, sampling         a token of each request
    embed ─▶ [piece 0] attention [piece 1] … attention [piece n] ─▶ head, sampling      all others

A graph replays fixed shapes at fixed addresses. So inputs are copied straight to where it reads
them, padded to the smallest recorded size. Spare rows have no adapter, write no KV (slot −1) and
attend to one position. Rows are independent, so the others get the same bits as without a graph.
Which adapters the rows have is data: the segments are built inside the graph, and the tables of the
pool, of routers and of input scales are read at replay. Launches of attention depend on how many
tokens each request has, so steps with prompt chunks are recorded in pieces around it.

Embeddings and head run outside, where a row's adapter may have its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from loraplex_kernels.layout import LoraSegments, LoraTables
from loraplex_kernels.pool import LoraPool
from loraplex_kernels.segments import build_segments
from loraplex_server.model.adapters_by_slot import AdaptersBySlot
from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.fused_decoder import FusedDecoder

from .forward_batch import ROW_INPUTS, FixedPlace, ForwardBatch
from .graph_recorder import Recorder, Replay
from .host_copy import bytes_together, place_together
from .kv_cache import KvCache
from .layer_kind import LayerKind
from .recorded_sizes import MAX_PAIRS, recorded_positions, recorded_sizes
from .slot_tables import SlotTables

__all__ = ["StepGraphs"]

_log = logging.getLogger(__name__)
_MORE_BYTES = 128  # a row, at most, of what else a step brings beside its page table


class StepGraphs:
    """Owner of the tensors that recorded steps read and write. Engine thread only."""

    def __init__(
        self,
        model: BaseModel,
        layers: FusedDecoder,
        kv_cache: KvCache,
        pool: LoraPool,
        tables: SlotTables,
        recorder: Recorder,
        *,
        max_mixed_rows: int,  # of steps that are recorded in pieces; 0 = none
    ) -> None:
        self._model, self._layers = model, layers
        self._pool = pool
        self._recorder = recorder
        n_requests, n_pages = kv_cache.page_table.shape
        self._sizes = {
            kind: recorded_sizes(kind, n_requests, max_mixed_rows, layers.n_layers)
            for kind in LayerKind
        }
        n_rows = max(n_requests, max_mixed_rows)
        device = model.device
        self._rows = layers.new_rows(n_rows)
        parts = [(dtype, n_rows) for dtype in ROW_INPUTS]
        more = _MORE_BYTES * n_rows + 4 * n_pages * n_requests
        n_bytes = bytes_together([*parts, (torch.uint8, more)])
        self._memory = torch.zeros(n_bytes, dtype=torch.uint8, device=device)
        self._page_table = torch.zeros(n_requests, n_pages, dtype=torch.int32, device=device)
        self._query_starts = torch.arange(n_requests + 1, dtype=torch.int32, device=device)
        page_size = kv_cache.page_size
        self._widths = {
            kind: tuple(
                min(n_pages, -(-n // page_size))
                for n in recorded_positions(kind, n_pages * page_size)
            )
            for kind in LayerKind
        }
        # For the pages of a request that attention looks at; ascending.
        self._whole: dict[tuple[int, LayerKind], dict[int, Replay]] = {}
        self._pieces: dict[tuple[int, LayerKind], tuple[Replay, ...]] = {}
        self._segments: dict[tuple[int, LayerKind], LoraSegments] = {}  # that pieces share
        self._in_scales, self._slice_scales = tables.in_scales, tables.slice_scales
        self._block_routers = tables.routers(of_projections=False)
        self._all_routers = tables.routers(of_projections=True)
        self._pair_ids = torch.arange(MAX_PAIRS, dtype=torch.int32, device=device)
        # Of any one target: all are replaced together. What was recorded reads these.
        self._tables: LoraTables | None = None

    @torch.inference_mode()
    def record_all(self) -> None:
        """Called at start, before requests. Raises what the device or a compiler raises."""
        self._tables = self._current_tables()
        started, free_before = time.monotonic(), self._free_bytes()
        # The largest first: the others fit in its memory.
        for is_decode in (False, True):
            sizes = {n for each in self._sizes.values() for n in each.of(is_decode=is_decode)}
            for size in sorted(sizes, reverse=True):
                self._empty(size)
                for kind in LayerKind:
                    if size in self._sizes[kind].of(is_decode=is_decode):
                        self._record(size, kind, is_decode=is_decode)
        self._model.step.clear_adapters()
        self._log_recorded(time.monotonic() - started, free_before - self._free_bytes())

    def place(self, kind: LayerKind, n_rows: int, *, is_decode: bool) -> FixedPlace | None:
        """Where the inputs of such a step go; None if none is recorded that holds it.

        ``is_decode``: a row of each request. Nothing is recorded here: that would hold up all
        requests for seconds.
        """
        if kind > LayerKind.BASE and self._tables is not self._current_tables():
            self._forget_adapters()
        sizes = self._sizes[kind].of(is_decode=is_decode)
        size = next((size for size in sizes if size >= n_rows), None) if n_rows else None
        if size is None or (size, kind) not in (self._whole if is_decode else self._pieces):
            return None
        return FixedPlace(self._memory, size, pads_requests=is_decode)

    def run(
        self, kind: LayerKind, batch: ForwardBatch, place: FixedPlace, embeddings: Tensor
    ) -> Tensor:
        """Hidden states [place.n_rows, hidden_size] of ``batch``, which was built in ``place``.

        They are valid until the next run.
        """
        size = place.n_rows
        rows = self._rows.first(size)
        rows.residual.copy_(embeddings)
        if place.pads_requests:
            n, width = batch.page_table.shape
            self._page_table[:n, :width].copy_(batch.page_table)
            of_width = self._whole[size, kind]
            next(replay for n_pages, replay in of_width.items() if n_pages >= width)()
            return rows.hidden
        n = batch.chunk_rows[-1].stop
        attended = rows.first(n)
        tables = batch.page_table, batch.query_starts, batch.kv_lens
        for index, replay in enumerate(self._pieces[size, kind]):
            replay()
            if index < self._layers.n_layers:
                self._layers.attend(index, attended, *tables, batch.planned_attention)
        return rows.hidden

    def _record(self, size: int, kind: LayerKind, *, is_decode: bool) -> None:
        if is_decode:
            self._whole[size, kind] = {
                n_pages: self._recorder(partial(self._run_whole, size, kind, n_pages))
                for n_pages in self._widths[kind]
            }
        else:
            self._pieces[size, kind] = tuple(self._record_pieces(size, kind))

    def _free_bytes(self) -> int:
        """Of the device; 0 on a CPU."""
        device = self._model.device
        return 0 if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]

    def _log_recorded(self, seconds: float, n_bytes: int) -> None:
        n_graphs = sum(map(len, (*self._whole.values(), *self._pieces.values())))
        common, rare = self._sizes[LayerKind.LORA], self._sizes[LayerKind.ROUTED_MLP]
        _log.info(
            "recorded %d CUDA graphs in %.1f s, %d MiB: decode steps of %s rows (with experts %s), "
            "others of %s (%s)",
            n_graphs,
            seconds,
            n_bytes >> 20,
            *(
                ", ".join(map(str, sizes)) or "none"
                for sizes in (common.decode, rare.decode, common.mixed, rare.mixed)
            ),
        )

    def _record_pieces(self, size: int, kind: LayerKind) -> Iterator[Replay]:
        for index in range(self._layers.n_layers + 1):
            yield self._recorder(partial(self._run_piece, index, size, kind))

    def _run_whole(self, size: int, kind: LayerKind, n_pages: int) -> None:
        self._bind(size, kind)
        self._model.step.segments = self._build_segments(size, kind)
        rows = self._rows.first(size)
        page_table = self._page_table[:size, :n_pages]
        tables = page_table, self._query_starts[: size + 1], self._kv_lens(size)
        for index in range(self._layers.n_layers):
            self._layers.run_piece(index, rows)
            self._layers.attend(index, rows, *tables)
        self._layers.run_piece(self._layers.n_layers, rows)

    def _run_piece(self, index: int, size: int, kind: LayerKind) -> None:
        self._bind(size, kind)
        if index == 0:
            segments = self._build_segments(size, kind)
            if segments is not None:
                self._segments[size, kind] = segments  # held: later pieces read it
        self._model.step.segments = self._segments.get((size, kind))
        self._layers.run_piece(index, self._rows.first(size))

    def _bind(self, size: int, kind: LayerKind) -> None:
        """The step reads the fixed inputs."""
        step = self._model.step
        _, step.positions, step.slot_mapping, row_slots = self._inputs(size)
        step.clear_adapters()
        step.by_slot = self._by_slot(kind, row_slots)
        step.routes_projections = kind.does(LayerKind.ROUTED_PROJECTIONS)

    def _by_slot(self, kind: LayerKind, row_slots: Tensor) -> AdaptersBySlot | None:
        if not kind.scales_inputs:
            return None
        routers = {}
        if kind.has_pairs:
            of_projections = kind.does(LayerKind.ROUTED_PROJECTIONS)
            routers = self._all_routers if of_projections else self._block_routers
        return AdaptersBySlot(
            row_slots,
            self._pool.storage,
            self._pair_ids,
            routers,
            self._in_scales,
            self._slice_scales if kind.does(LayerKind.SLICE_SCALES) else {},
            own_downs=kind.does(LayerKind.OWN_DOWNS),
        )

    def _build_segments(self, size: int, kind: LayerKind) -> LoraSegments | None:
        return None if kind is LayerKind.BASE else build_segments(self._inputs(size)[3])

    def _inputs(self, size: int) -> list[Tensor]:
        """Token ids, positions, KV slots and adapter slots of a step of ``size`` rows."""
        return place_together(self._memory, [(dtype, size) for dtype in ROW_INPUTS])

    def _kv_lens(self, size: int) -> Tensor:
        parts = [*((dtype, size) for dtype in ROW_INPUTS), (torch.int32, size)]
        return place_together(self._memory, parts)[-1]

    def _empty(self, size: int) -> None:
        """All rows are spare ones."""
        token_ids, positions, slot_mapping, row_slots = self._inputs(size)
        token_ids.zero_()
        positions.zero_()
        slot_mapping.fill_(-1)
        row_slots.fill_(-1)
        self._kv_lens(size).fill_(1)

    def _current_tables(self) -> LoraTables:
        return self._pool.tables(next(iter(self._pool.targets)))

    def _forget_adapters(self) -> None:
        """A rank came that the tables had no room for: those recorded are read no more."""
        if not any(kind for _, kind in self._whole):
            return
        self._whole = {key: graph for key, graph in self._whole.items() if not key[1]}
        self._pieces = {key: graph for key, graph in self._pieces.items() if not key[1]}
        _log.warning(
            "an adapter has a larger rank than was planned for: from now on steps with adapters"
            " run without CUDA graphs; start with --max-lora-rank of the largest rank"
        )
