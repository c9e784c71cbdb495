"""Runs steps of every size once, so that a GPU's kernels are compiled before the first request.

Triton compiles a kernel at its first launch with other constants, which takes seconds. Constants
follow from the model, from the number of rows by a few bounds, and from whether rows have adapters
and route to experts of MLP blocks: pairs are rows of their own there, however many a row has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from loraplex_adapter_store.plan import RoutingStrategy
from loraplex_kernels.sampling import empty_batch, sample_tokens
from loraplex_kernels.segments import build_segments
from loraplex_router.experts import PlacedExperts, RoutedRows
from loraplex_server.model.base_model import BaseModel

from .forward_batch import ForwardBatch

__all__ = ["run_every_size", "sizes_to_run"]


def sizes_to_run(max_rows: int) -> tuple[int, ...]:
    """Rows on both sides of every bound: bounds are powers of two."""
    powers = [1 << i for i in range(max_rows.bit_length())]
    both = {n for power in powers for n in (power, power + 1) if n <= max_rows}
    return tuple(sorted(both | {max_rows}))


@torch.inference_mode()
def run_every_size(model: BaseModel, *, max_rows: int, max_requests: int, n_pages: int) -> None:
    """Prefill of one request and decode of many, with adapters (of no rank), with experts of MLP
    blocks (in no slot) and without.

    ``n_pages``: of a request, as many as the longest has, and room for ``max_rows`` positions:
    attention reads the table up to the last one, and how wide it is decides what it launches.

    Writes no KV. ``model`` has its KV cache and pool. Engine thread; raises what the device or a
    compiler raises. What free steps launch for experts of projections depends on how many a row
    has: it is not run.
    """
    for size in sizes_to_run(max_rows):
        for n_requests in dict.fromkeys((1, min(size, max_requests))):
            for batch in _batches(model, size, n_requests, n_pages):
                _forward(model, batch, n_requests)
            _forward(model, batch, n_requests, routed=_routed(model, size))
        _run_parts(model, size)
    model.step.clear_adapters()


def _run_parts(model: BaseModel, n_rows: int) -> None:
    """The product of each of several packed linears alone, as rows with scaled inputs need it."""
    shapes = set()
    for group in model.groups.values():
        target = group.target
        shape = (target.in_features, target.out_features)
        if target.n_slices == 1 or shape in shapes:
            continue
        shapes.add(shape)
        x = torch.zeros(n_rows, target.in_features, dtype=model.dtype, device=model.device)
        for index, width in enumerate(target.out_features):
            group.packed.into_part(index, x, x.new_empty(n_rows, width))


def _batches(
    model: BaseModel, n_rows: int, n_requests: int, n_pages: int
) -> Iterator[ForwardBatch]:
    device = model.device
    rows = torch.zeros(n_rows, dtype=torch.int64, device=device)
    starts = torch.arange(n_requests + 1, dtype=torch.int32, device=device)
    starts[-1] = n_rows  # the last request has all other rows
    for has_adapters in (False, True):
        yield ForwardBatch(
            token_ids=rows,
            positions=rows,
            slot_mapping=rows - 1,  # nowhere
            page_table=torch.zeros(n_requests, n_pages, dtype=torch.int32, device=device),
            query_starts=starts,
            kv_lens=starts.diff(),
            chunk_rows=(),
            virtual_rows=(),
            row_slots=rows.int() - 1 if has_adapters else None,
        )


def _routed(model: BaseModel, n_rows: int) -> Mapping[str, tuple[RoutedRows, ...]]:
    """All rows go to two experts of every MLP block."""
    device = model.device
    experts = PlacedExperts(
        gate=torch.zeros(2, model.spec.hidden_size, device=device),
        slots=torch.full((2,), -1, dtype=torch.int32, device=device),
        strategy=RoutingStrategy.TOP_K,
        top_k=2,
        top_p=0.0,
        load=torch.zeros(2, dtype=torch.int64, device=device),
    )
    rows = torch.arange(n_rows, device=device)
    routed = RoutedRows(rows, RoutedRows.pair_rows_of(rows, 2), experts)
    return dict.fromkeys(model.mlps, (routed,))


def _forward(
    model: BaseModel,
    batch: ForwardBatch,
    n_requests: int,
    routed: Mapping[str, tuple[RoutedRows, ...]] = MappingProxyType({}),
) -> None:
    step = model.step
    batch.bind(step)
    step.clear_adapters()
    step.segments = None if batch.row_slots is None else build_segments(batch.row_slots)
    step.routed = routed
    hidden = model.forward(model.embed(batch.token_ids))
    raw = model.head.packed(hidden[:n_requests])
    logits: Tensor = torch.empty_like(raw, dtype=torch.float32)
    model.finish_logits(raw, logits)
    sample_tokens(logits, empty_batch(n_requests, model.vocab_size, model.device))
