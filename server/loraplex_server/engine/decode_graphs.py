"""Decode steps as CUDA graphs: one launch for a step instead of a dozen for every layer.

A graph replays fixed shapes at fixed addresses. So a step of n rows is copied into the first rows
of fixed tensors, of the smallest recorded size that holds it. Padding rows have no adapter, write
no KV (slot −1) and attend to one position. Rows are independent, so the others get the same bits as
without a graph. Which adapters the rows have is data: the segments are built inside the graph, and
the pool's tables are read at replay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from loraplex_kernels.layout import LoraTables
from loraplex_kernels.pool import LoraPool
from loraplex_kernels.segments import build_segments
from loraplex_server.model.base_model import BaseModel

from .forward_batch import ForwardBatch
from .kv_cache import KvCache

__all__ = ["CudaRecorder", "DecodeGraphs", "Recorder", "sizes_up_to"]

_log = logging.getLogger(__name__)

Replay = Callable[[], None]


class Recorder(Protocol):
    def __call__(self, work: Callable[[], None]) -> Replay:
        """Records what ``work`` launches; the replay launches it again."""


class CudaRecorder:
    """Graphs that share one memory: only one runs at a time."""

    def __init__(self) -> None:
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, work: Callable[[], None]) -> Replay:
        # Off the recording, on a stream of its own: kernels are compiled, libraries set up.
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            work()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # Of this thread alone: loads go on beside it.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            work()
        return graph.replay


def sizes_up_to(n_rows: int) -> tuple[int, ...]:
    """1, 2, 4, multiples of 8 up to 64, of 16 up to 128, of 32: few spare rows, which cost little.

    Each size is recorded at start, with adapters and without.
    """
    sizes = (1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, n_rows, 32))
    return (*(n for n in sizes if n < n_rows), n_rows)


class DecodeGraphs:
    """Owner of the tensors that decode steps are laid into. Engine thread only."""

    def __init__(
        self, model: BaseModel, kv_cache: KvCache, pool: LoraPool, recorder: Recorder
    ) -> None:
        self._model = model
        self._pool = pool
        self._recorder = recorder
        n_rows, n_pages = kv_cache.page_table.shape

        def rows(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(n_rows, *shape, dtype=dtype, device=model.device)

        self._token_ids, self._positions = rows(torch.int64), rows(torch.int64)
        self._slot_mapping, self._kv_lens = rows(torch.int64), rows(torch.int32)
        self._page_table = rows(torch.int32, n_pages)
        self._slots = rows(torch.int32)
        self._raw = rows(model.dtype, model.vocab_size)
        self._query_starts = torch.arange(n_rows + 1, dtype=torch.int32, device=model.device)
        self._clear(slice(0, n_rows))
        self._sizes = sizes_up_to(n_rows)
        self._graphs: dict[tuple[int, bool], Replay] = {}
        # Of any one target: all are replaced together. What was recorded reads these.
        self._tables: LoraTables | None = None

    @torch.inference_mode()
    def record_all(self) -> None:
        """Called at start, before requests. Raises what the device or a compiler raises."""
        self._tables = self._current_tables()
        for size in reversed(self._sizes):  # the largest first: the others fit in its memory
            for has_adapters in (False, True):
                self._graphs[size, has_adapters] = self._recorder(
                    partial(self._forward, size, has_adapters)
                )
        _log.info("recorded decode steps of %s rows", ", ".join(map(str, self._sizes)))

    def run(self, batch: ForwardBatch, slots: Sequence[int]) -> Tensor | None:
        """One token of each request → raw logits [n, vocab_size], valid until the next run.

        ``slots``: the pool slot of each row, −1 for the base's. None if such a step is not recorded
        any more. Nothing is recorded here: that would hold up all requests for seconds.
        """
        n, has_adapters = len(slots), any(slot >= 0 for slot in slots)
        if has_adapters and self._tables is not self._current_tables():
            self._forget_adapters()
        size = next(size for size in self._sizes if size >= n)
        replay = self._graphs.get((size, has_adapters))
        if replay is None:
            return None
        self._lay(batch, slots, n, size)
        replay()
        return self._raw[:n]

    def _lay(self, batch: ForwardBatch, slots: Sequence[int], n: int, size: int) -> None:
        self._token_ids[:n].copy_(batch.token_ids)
        self._positions[:n].copy_(batch.positions)
        self._slot_mapping[:n].copy_(batch.slot_mapping)
        self._kv_lens[:n].copy_(batch.kv_lens)
        self._page_table[:n, : batch.page_table.shape[1]].copy_(batch.page_table)
        if batch.row_slots is None:  # on a CPU
            self._slots[:n].copy_(torch.tensor(slots, dtype=torch.int32))
        else:
            self._slots[:n].copy_(batch.row_slots)
        self._clear(slice(n, size))

    def _clear(self, rows: slice) -> None:
        """Makes spare rows of them: no adapter, no KV to write, one position to look at."""
        self._slots[rows] = -1
        self._slot_mapping[rows] = -1
        self._kv_lens[rows] = 1
        self._positions[rows] = 0

    def _current_tables(self) -> LoraTables:
        return self._pool.tables(next(iter(self._pool.targets)))

    def _forget_adapters(self) -> None:
        """A rank came that the tables had no room for: those recorded are read no more."""
        if any(has_adapters for _, has_adapters in self._graphs):
            self._graphs = {key: graph for key, graph in self._graphs.items() if not key[1]}
            _log.warning(
                "an adapter has a larger rank than was planned for: from now on steps with adapters"
                " run without CUDA graphs; start with --max-lora-rank of the largest rank"
            )

    def _forward(self, size: int, has_adapters: bool) -> None:
        model, step = self._model, self._model.step
        batch = ForwardBatch(
            token_ids=self._token_ids[:size],
            positions=self._positions[:size],
            slot_mapping=self._slot_mapping[:size],
            page_table=self._page_table[:size],
            query_starts=self._query_starts[: size + 1],
            kv_lens=self._kv_lens[:size],
            chunk_rows=(),
            virtual_rows=(),
        )
        batch.bind(step)
        step.segments = build_segments(self._slots[:size]) if has_adapters else None
        step.fallback, step.routed, step.routes_projections = (), {}, False
        hidden = model.forward(model.embed(batch.token_ids))
        model.head.packed.into(hidden, self._raw[:size])
