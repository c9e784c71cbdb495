"""The layers of a step as CUDA graphs: a few launches instead of a dozen for every layer.

    embed ─▶ [layers, attention included] ─▶ head, sampling         a token of each request
    embed ─▶ [piece 0] attention [piece 1] … attention [piece n] ─▶ head, sampling      all others

A graph replays fixed shapes at fixed addresses. So inputs are copied to its buffers and padded to
the smallest captured size. Spare rows have no adapter, write no KV (slot −1) and attend to one
position. No row reads another, so a graph changes results in the last bits at most, by the order of
cuBLAS's sums, and with ``--deterministic`` not at all. The rows' adapters are data: segments are
built inside the graph, and the tables of the pool and of gates are read at replay. Launches of our
attention depend on the tokens of each request, so steps with prompt chunks are captured as
piecewise graphs around it.

Embeddings and head run outside the graphs, since a row's adapter may have its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from loraplex_kernels.formats.host_copy import bytes_together, place_together
from loraplex_kernels.formats.layout import LoraSegments
from loraplex_kernels.layers.flashinfer_attention import CapturedAttention, FlashInferAttention
from loraplex_kernels.lora.pool import LoraPool
from loraplex_kernels.lora.segments import build_segments
from loraplex_server.engine.adapters.gate_tables import GateTables
from loraplex_server.engine.adapters.layer_kind import LayerKind
from loraplex_server.engine.memory.kv_cache import KvCache
from loraplex_server.model.base_model import BaseModel
from loraplex_server.model.layers.forward_context import CapturedExperts
from loraplex_server.model.layers.fused_decoder import FusedDecoder

from .captured_sizes import captured_positions, captured_sizes
from .forward_batch import ROW_INPUTS, ForwardBatch, GraphBuffers

_log = logging.getLogger(__name__)
_MORE_BYTES = 128  # a row, at most, for the inputs beside ``ROW_INPUTS`` and the page table


class StepGraphs:
    """Owner of the tensors that captured steps read and write. Engine thread only."""

    def __init__(
        self,
        model: BaseModel,
        layers: FusedDecoder,
        kv_cache: KvCache,
        pool: LoraPool,
        gates: GateTables,
        capture: GraphCapture,
        *,
        max_mixed_rows: int,  # of piecewise graphs; 0 = none
        flashinfer: FlashInferAttention | None = None,
    ) -> None:
        self._model, self._layers = model, layers
        self._pool = pool
        self._capture_graph = capture
        n_requests, n_pages = kv_cache.page_table.shape
        self._sizes = {
            kind: captured_sizes(kind, n_requests, max_mixed_rows, layers.n_layers)
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
        # FlashInfer's launches do not depend on the width of the page table.
        self._widths = {
            kind: tuple(
                min(n_pages, -(-n // page_size))
                for n in captured_positions(kind, n_pages * page_size)
            )
            if flashinfer is None
            else (n_pages,)
            for kind in LayerKind
        }
        self._attention: dict[int, CapturedAttention] = {}  # of decode steps, by size
        if flashinfer is not None:
            indices = torch.zeros_like(self._page_table).view(-1)
            self._attention = {
                size: CapturedAttention(flashinfer, self._page_table[:size], indices)
                for sizes in self._sizes.values()
                for size in sizes.decode
            }
        # By the most pages of a request, ascending.
        self._whole: dict[tuple[int, LayerKind], dict[int, Replay]] = {}
        self._pieces: dict[tuple[int, LayerKind], tuple[Replay, ...]] = {}
        self._segments: dict[tuple[int, LayerKind], LoraSegments] = {}  # shared by the pieces
        self._gates = gates.by_block()

    @torch.inference_mode()
    def capture(self, kind: LayerKind) -> None:
        """Captures the graphs of a kind, before the first request.

        Raises errors of device and compiler. Steps of this kind then have no graph.
        """
        started, free_before = time.monotonic(), self._free_bytes()
        try:
            # The largest first, whose memory the others reuse.
            for is_decode in (False, True):
                for size in reversed(self._sizes[kind].of(is_decode=is_decode)):
                    self._empty(size)
                    self._capture(size, kind, is_decode=is_decode)
        except BaseException:
            self._whole = {key: graph for key, graph in self._whole.items() if key[1] != kind}
            self._pieces = {key: graph for key, graph in self._pieces.items() if key[1] != kind}
            raise
        finally:
            self._model.step.clear_adapters()
        self._log_captured(kind, time.monotonic() - started, free_before - self._free_bytes())

    def buffers_for(self, kind: LayerKind, n_rows: int, *, is_decode: bool) -> GraphBuffers | None:
        """Return the buffers of the smallest graph that holds the step; None if there is none.

        ``is_decode``: each row is a request. Captures nothing, which would take seconds.
        """
        sizes = self._sizes[kind].of(is_decode=is_decode)
        size = next((size for size in sizes if size >= n_rows), None) if n_rows else None
        if size is None or (size, kind) not in (self._whole if is_decode else self._pieces):
            return None
        return GraphBuffers(self._memory, size, pads_requests=is_decode)

    def run(
        self, kind: LayerKind, batch: ForwardBatch, buffers: GraphBuffers, embeddings: Tensor
    ) -> Tensor:
        """Return the hidden states [buffers.n_rows, hidden_size], valid until the next run.

        ``batch`` must have been built in ``buffers``.
        """
        size = buffers.n_rows
        rows = self._rows.first(size)
        rows.residual.copy_(embeddings)
        if buffers.pads_requests:
            n, width = batch.page_table.shape
            self._page_table[:n, :width].copy_(batch.page_table)
            if size in self._attention:
                assert batch.planned_attention is not None
                self._attention[size].plan(batch.planned_attention.kv_lens)
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

    def _capture(self, size: int, kind: LayerKind, *, is_decode: bool) -> None:
        if is_decode:
            self._whole[size, kind] = {
                n_pages: self._capture_graph(partial(self._run_whole, size, kind, n_pages))
                for n_pages in self._widths[kind]
            }
        else:
            self._pieces[size, kind] = tuple(self._capture_pieces(size, kind))

    def _free_bytes(self) -> int:
        """Return the free memory of the device; 0 on a CPU."""
        device = self._model.device
        return 0 if device.type == "cpu" else torch.cuda.mem_get_info(device)[0]

    def _log_captured(self, kind: LayerKind, seconds: float, n_bytes: int) -> None:
        graphs = (*self._whole.items(), *self._pieces.items())
        decode, mixed = self._sizes[kind]
        _log.info(
            "captured %d CUDA graphs of %s layers in %.1f s, %d MiB: decode steps of %s rows, "
            "others of %s",
            sum(len(replays) for (_, of), replays in graphs if of is kind),
            kind.name.lower(),
            seconds,
            n_bytes >> 20,
            *(", ".join(map(str, sizes)) or "none" for sizes in (decode, mixed)),
        )

    def _capture_pieces(self, size: int, kind: LayerKind) -> Iterator[Replay]:
        for index in range(self._layers.n_layers + 1):
            yield self._capture_graph(partial(self._run_piece, index, size, kind))

    def _run_whole(self, size: int, kind: LayerKind, n_pages: int) -> None:
        self._bind(size, kind)
        self._model.step.segments = self._build_segments(size, kind)
        rows = self._rows.first(size)
        page_table = self._page_table[:size, :n_pages]
        tables = page_table, self._query_starts[: size + 1], self._kv_lens(size)
        for index in range(self._layers.n_layers):
            self._layers.run_piece(index, rows)
            self._layers.attend(index, rows, *tables, self._attention.get(size))
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
        """Binds the step to the fixed inputs."""
        step = self._model.step
        _, step.positions, step.slot_mapping, row_slots = self._inputs(size)
        step.clear_adapters()
        if kind is LayerKind.ROUTED_MLP:
            step.captured_experts = CapturedExperts(row_slots, self._pool.storage, self._gates)

    def _build_segments(self, size: int, kind: LayerKind) -> LoraSegments | None:
        return None if kind is LayerKind.BASE else build_segments(self._inputs(size)[3])

    def _inputs(self, size: int) -> list[Tensor]:
        """Return token ids, positions, KV slots and adapter slots of a step of ``size`` rows."""
        return place_together(self._memory, [(dtype, size) for dtype in ROW_INPUTS])

    def _kv_lens(self, size: int) -> Tensor:
        parts = [*((dtype, size) for dtype in ROW_INPUTS), (torch.int32, size)]
        return place_together(self._memory, parts)[-1]

    def _empty(self, size: int) -> None:
        """Marks all rows as padding."""
        token_ids, positions, slot_mapping, row_slots = self._inputs(size)
        token_ids.zero_()
        positions.zero_()
        slot_mapping.fill_(-1)
        row_slots.fill_(-1)
        self._kv_lens(size).fill_(1)


Replay = Callable[[], None]


class GraphCapture(Protocol):
    def __call__(self, work: Callable[[], None]) -> Replay:
        """Capture the launches of ``work`` and return a function that replays them."""


class CudaGraphCapture:
    """Captures graphs that share one memory pool, so only one may run at a time.

    Another graph may reuse memory that ``work`` allocates. Results that must outlast the replay
    need memory that was allocated before.
    """

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, work: Callable[[], None]) -> Replay:
        if self._stream is None:  # created on the engine thread, with its device
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside, current = self._stream, torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            work()  # not captured: compiles kernels and initialises libraries
            # ``torch.cuda.graph`` would collect garbage before each of a thousand pieces.
            # Thread-local, so that loads can continue.
            graph.capture_begin(pool=self._memory, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
            # Capturing runs nothing. Later captures read this one's results (segments of piecewise
            # graphs), which must not be uninitialised.
            graph.replay()
        current.wait_stream(aside)
        return graph.replay
