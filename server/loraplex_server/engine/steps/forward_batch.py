"""The tensors of one step, built from its chunks with numpy and moved to the device once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loraplex_kernels.formats.host_copy import move_together
from loraplex_kernels.layers.flashinfer_attention import FlashInferAttention, PlannedAttention
from loraplex_server.engine.memory.kv_cache import KvCache
from loraplex_server.engine.requests.request import Request
from loraplex_server.engine.scheduling.scheduler import ScheduledChunk
from loraplex_server.model.layers.forward_context import BlockRows, ForwardContext


@dataclass(frozen=True, slots=True)
class GraphBuffers:
    """The buffers that a captured step reads, and the number of rows it was captured for."""

    memory: Tensor  # uint8, on the device; begins with ``ROW_INPUTS``
    n_rows: int  # at least those of the step; spare rows write no KV and have no adapter
    pads_requests: bool  # True if each row is a request, as in steps that are captured whole


@dataclass(frozen=True, slots=True)
class FutureTokens:
    """Rows whose tokens the previous step computes. They are copied on the device."""

    ids: Tensor  # int32 [n_sampled], negative where there is no token
    rows: Sequence[int]  # of this step
    sources: Sequence[int]  # the index of each row's token in ``ids``


# What captured layers read, in this order: token ids, positions, KV slots, adapter slots.
ROW_INPUTS = (torch.int64, torch.int64, torch.int64, torch.int32)


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """The inputs of a step, whose rows are the tokens of all chunks in order.

    In ``GraphBuffers`` spare rows follow, and spare requests if the buffers pad requests.
    """

    token_ids: Tensor  # int64 [n_rows]; 0 for virtual tokens
    positions: Tensor  # int64 [n_rows]
    slot_mapping: Tensor  # int64 [n_rows], flat KV slot
    page_table: Tensor  # int32 [n_chunks, max_pages]
    query_starts: Tensor  # int32 [n_chunks + 1]
    kv_lens: Tensor  # int32 [n_chunks], this step included; 1 for spare requests
    chunk_rows: tuple[slice, ...]  # rows of each chunk
    virtual_rows: tuple[tuple[int, Request, int], ...]  # (row, request, index of virtual token)
    row_slots: Tensor | None = None  # int32 [n_rows], adapter slots, −1 = none; not on a CPU
    # int64 [n], the rows that sample: the last ones of chunks; None if every row samples
    sampling_rows: Tensor | None = None
    own_rows: Mapping[str, Tensor] = field(default_factory=dict)  # int64, see ``build_batch``
    planned_attention: PlannedAttention | None = None
    rope_positions: Tensor | None = None  # int64 [3, n_rows], if a request has images with axes
    blocks: tuple[BlockRows, ...] = ()

    def bind(self, step: ForwardContext) -> None:
        """Copies positions, slots and page tables into the step. Adapters are set elsewhere."""
        step.positions, step.slot_mapping = self.positions, self.slot_mapping
        step.page_table, step.query_starts = self.page_table, self.query_starts
        step.kv_lens, step.logits_rows = self.kv_lens, None
        step.planned_attention = self.planned_attention
        step.rope_positions, step.blocks = self.rope_positions, self.blocks


def build_batch(
    chunks: Sequence[ScheduledChunk],
    kv_cache: KvCache,
    device: torch.device,
    *,
    slots: Sequence[int] | None = None,  # adapter slot of each chunk, if ``row_slots`` are needed
    own_rows: Mapping[str, Sequence[int]] | None = None,  # rows of adapters, to be moved, too
    flashinfer: FlashInferAttention | None = None,
    buffers: GraphBuffers | None = None,  # of a captured step, which needs ``slots``
    future: FutureTokens | None = None,
) -> ForwardBatch:
    """Build the inputs of a step, whose requests have pages for all tokens."""
    n_tokens = np.array([chunk.n_rows for chunk in chunks], dtype=np.int64)
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
        (t for c in chunks for t in (*_known_tokens(c), *c.drafts)),
        dtype=np.int64,
        count=int(query_starts[-1]),
    )
    arrays: dict[str, NDArray[np.int64] | NDArray[np.int32]] = {
        "token_ids": np.maximum(token_ids, 0),
        "positions": positions,
        "slot_mapping": slot_mapping,
    }
    if slots is not None:
        arrays["row_slots"] = np.repeat(np.array(slots, dtype=np.int32), n_tokens)
    arrays |= {
        "kv_lens": kv_lens.astype(np.int32),
        "page_table": np.ascontiguousarray(page_table),
        "query_starts": query_starts.astype(np.int32),
    }
    if any(chunk.request.rope is not None for chunk in chunks):
        arrays["rope_positions"] = np.concatenate([*map(_rope_positions, chunks)], axis=1)
    if buffers is not None:
        _add_spare_rows(arrays, buffers)
    sampling = [
        row
        for chunk, end in zip(chunks, query_starts[1:].tolist(), strict=True)
        for row in range(end - len(chunk.generating), end)
    ]
    if len(sampling) < len(token_ids):
        arrays["sampling_rows"] = np.array(sampling, dtype=np.int64)
    own = own_rows or {}
    extra = [] if future is None else [future.rows, future.sources]
    extra_arrays = [np.array(part, dtype=np.int64) for part in (*extra, *own.values())]
    memory = None if buffers is None else buffers.memory
    moved = move_together([*arrays.values(), *extra_arrays], device, into=memory)
    named = dict(zip(arrays, moved, strict=False))
    if future is not None:
        rows, sources = moved[len(arrays) : len(arrays) + 2]
        tokens = future.ids.index_select(0, sources).clamp_(min=0)
        named["token_ids"].index_copy_(0, rows, tokens.long())
    on_device = moved[len(moved) - len(own) :]
    if buffers is not None:
        on_device = [part.clone() for part in on_device]  # they outlive the buffers' contents
    return ForwardBatch(
        chunk_rows=tuple(slice(int(first), int(end)) for first, end in pairwise(query_starts)),
        virtual_rows=_virtual_rows(chunks, query_starts),
        planned_attention=None
        if flashinfer is None
        else PlannedAttention(flashinfer, n_tokens, kv_lens, named["page_table"]),
        own_rows=dict(zip(own, on_device, strict=True)),
        blocks=_block_rows(chunks, query_starts),
        **named,
    )


def _known_tokens(chunk: ScheduledChunk) -> Sequence[int]:
    return chunk.request.token_ids[chunk.start : chunk.start + chunk.n_tokens]


_SPARE = (("token_ids", 0), ("positions", 0), ("slot_mapping", -1), ("row_slots", -1))


def _add_spare_rows(
    arrays: dict[str, NDArray[np.int64] | NDArray[np.int32]], buffers: GraphBuffers
) -> None:
    """Pads the arrays. Spare rows have no adapter and write no KV; spare requests have length 1."""
    requests = (("kv_lens", 1),) if buffers.pads_requests else ()
    for name, value in (*_SPARE, *requests):
        padded = np.full(buffers.n_rows, value, dtype=arrays[name].dtype)
        padded[: len(arrays[name])] = arrays[name]
        arrays[name] = padded


def _rope_positions(chunk: ScheduledChunk) -> NDArray[np.int64]:
    """Return the positions [3, n_rows] of a chunk."""
    rope = chunk.request.rope
    if rope is not None:
        return rope.of(chunk.start, chunk.n_rows)
    return np.tile(np.arange(chunk.start, chunk.start + chunk.n_rows), (3, 1))


def _block_rows(
    chunks: Sequence[ScheduledChunk], query_starts: NDArray[np.int64]
) -> tuple[BlockRows, ...]:
    """Return the rows within blocks. A chunk that has tokens of a block has its last one."""
    blocks = []
    for index, (chunk, row) in enumerate(zip(chunks, query_starts[:-1].tolist(), strict=True)):
        for block in chunk.request.blocks:
            if chunk.start < block.end and block.first < chunk.start + chunk.n_tokens:
                first = max(block.first, chunk.start)
                rows = slice(row + first - chunk.start, row + block.end - chunk.start)
                seen_from = block.end if block.has_windows else block.first
                blocks.append(BlockRows(rows, index, first, block.end, seen_from))
    return tuple(blocks)


def _virtual_rows(
    chunks: Sequence[ScheduledChunk], query_starts: NDArray[np.int64]
) -> tuple[tuple[int, Request, int], ...]:
    return tuple(
        (int(first) + index - chunk.start, chunk.request, index)
        for chunk, first in zip(chunks, query_starts[:-1], strict=True)
        for index in range(chunk.start, min(chunk.start + chunk.n_tokens, chunk.request.n_virtual))
    )
