"""The tensors of one step, built from its chunks with numpy and moved to the device once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_server.model.forward_context import ForwardContext

from .kv_cache import KvCache
from .request import Request
from .scheduler import ScheduledChunk

__all__ = ["ForwardBatch", "build_batch"]


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """Rows are the tokens of all chunks, one chunk after the other."""

    token_ids: Tensor  # int64 [n_rows]; 0 for virtual tokens
    positions: Tensor  # int64 [n_rows]
    slot_mapping: Tensor  # int64 [n_rows], flat KV slot
    page_table: Tensor  # int32 [n_chunks, max_pages]
    query_starts: Tensor  # int32 [n_chunks + 1]
    kv_lens: Tensor  # int32 [n_chunks], this step included
    chunk_rows: tuple[slice, ...]  # rows of each chunk
    virtual_rows: tuple[tuple[int, Request, int], ...]  # (row, request, index of virtual token)

    def bind(self, step: ForwardContext) -> None:
        """Copies positions, slots and page tables into the step. Adapters are set elsewhere."""
        step.positions, step.slot_mapping = self.positions, self.slot_mapping
        step.page_table, step.query_starts = self.page_table, self.query_starts
        step.kv_lens, step.logits_rows = self.kv_lens, None


def build_batch(
    chunks: Sequence[ScheduledChunk], kv_cache: KvCache, device: torch.device
) -> ForwardBatch:
    """Pages for every token of the chunks must be there."""
    n_tokens = np.array([chunk.n_tokens for chunk in chunks], dtype=np.int64)
    starts = np.array([chunk.start for chunk in chunks], dtype=np.int64)
    query_starts = np.zeros(len(chunks) + 1, dtype=np.int64)
    np.cumsum(n_tokens, out=query_starts[1:])
    positions = np.arange(query_starts[-1]) - np.repeat(query_starts[:-1] - starts, n_tokens)
    table_rows = np.array([kv_cache.row(chunk.request.id) for chunk in chunks])
    kv_lens = starts + n_tokens
    n_pages = kv_cache.pages_for(int(kv_lens.max()))
    page_table = kv_cache.page_table[table_rows, :n_pages]
    pages = page_table[np.repeat(np.arange(len(chunks)), n_tokens), positions // kv_cache.page_size]
    slot_mapping = pages.astype(np.int64) * kv_cache.page_size + positions % kv_cache.page_size
    token_ids = np.fromiter(
        (t for c in chunks for t in c.request.token_ids[c.start : c.start + c.n_tokens]),
        dtype=np.int64,
        count=int(query_starts[-1]),
    )
    virtual_rows = _virtual_rows(chunks, query_starts)
    return ForwardBatch(
        token_ids=_move(np.maximum(token_ids, 0), device),
        positions=_move(positions, device),
        slot_mapping=_move(slot_mapping, device),
        page_table=_move(np.ascontiguousarray(page_table), device),
        query_starts=_move(query_starts.astype(np.int32), device),
        kv_lens=_move(kv_lens.astype(np.int32), device),
        chunk_rows=tuple(slice(int(first), int(end)) for first, end in pairwise(query_starts)),
        virtual_rows=virtual_rows,
    )


def _virtual_rows(
    chunks: Sequence[ScheduledChunk], query_starts: NDArray[np.int64]
) -> tuple[tuple[int, Request, int], ...]:
    return tuple(
        (int(first) + index - chunk.start, chunk.request, index)
        for chunk, first in zip(chunks, query_starts[:-1], strict=True)
        for index in range(chunk.start, min(chunk.start + chunk.n_tokens, chunk.request.n_virtual))
    )


def _move(array: NDArray[np.int64] | NDArray[np.int32], device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)
