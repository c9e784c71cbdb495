"""Runs steps of every size once, so that a GPU's kernels are compiled before the first request.

Triton compiles a kernel at its first launch with other constants, which takes seconds. Constants
follow from the model, from the number of rows by a few bounds, and from whether rows have adapters
and route to experts of MLP blocks: pairs are rows of their own there, however many a row has.
"""

import traceback
from collections.abc import Mapping

import torch
from torch import Tensor

from loraplex_adapter_store.plan import RoutingStrategy
from loraplex_kernels.formats.sampling_batch import empty_batch
from loraplex_kernels.layers.sampling import sample_tokens
from loraplex_kernels.lora.segments import build_segments
from loraplex_router.experts.expansion import PlacedExperts, RoutedRows
from loraplex_server.engine.adapters.layer_kind import LayerKind
from loraplex_server.model.base_model import BaseModel

from .forward_batch import ForwardBatch


def sizes_to_run(max_rows: int) -> tuple[int, ...]:
    """Rows on both sides of every bound: bounds are powers of two."""
    powers = [1 << i for i in range(max_rows.bit_length())]
    both = {n for power in powers for n in (power, power + 1) if n <= max_rows}
    return tuple(sorted(both | {max_rows}))


@torch.inference_mode()
def run_every_size(
    model: BaseModel, kind: LayerKind, *, max_rows: int, max_requests: int, n_pages: int
) -> None:
    """Run prefill of one request and decode of many, in all sizes, with layers of this kind.

    The adapters have rank 0, and the experts of MLP blocks have no slot. ``n_pages`` is the number
    of pages of the longest request. It must hold ``max_rows`` positions, since the width of the
    page table decides which attention kernels are launched.

    Writes no KV. ``model`` must have its KV cache and pool. Called on the engine thread. Raises the
    errors of the device and of compilers. Experts of projections are not run, since their launches
    depend on the number of experts of a row.
    """
    for size in sizes_to_run(max_rows):
        for n_requests in dict.fromkeys((1, min(size, max_requests))):
            batch = _batch(model, kind, size, n_requests, n_pages)
            is_routed = kind is LayerKind.ROUTED_MLP
            _forward(model, batch, n_requests, _routed(model, size) if is_routed else {})
        if kind is LayerKind.BASE:
            _run_parts(model, size)
    model.step.clear_adapters()


def failing_function(error: BaseException) -> str:
    """Return the innermost function of our kernels in the traceback; else the innermost one."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame.name for frame in frames if "loraplex_kernels" in frame.filename]
    return own[-1] if own else frames[-1].name


def _run_parts(model: BaseModel, n_rows: int) -> None:
    """Run each packed linear alone, as steps with scaled inputs do."""
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


def _batch(
    model: BaseModel, kind: LayerKind, n_rows: int, n_requests: int, n_pages: int
) -> ForwardBatch:
    device = model.device
    rows = torch.zeros(n_rows, dtype=torch.int64, device=device)
    starts = torch.arange(n_requests + 1, dtype=torch.int32, device=device)
    starts[-1] = n_rows  # the last request has all other rows
    return ForwardBatch(
        token_ids=rows,
        positions=rows,
        slot_mapping=rows - 1,  # nowhere
        page_table=torch.zeros(n_requests, n_pages, dtype=torch.int32, device=device),
        query_starts=starts,
        kv_lens=starts.diff(),
        chunk_rows=(),
        virtual_rows=(),
        row_slots=None if kind is LayerKind.BASE else rows.int() - 1,
    )


def _routed(model: BaseModel, n_rows: int) -> Mapping[str, tuple[RoutedRows, ...]]:
    """Return a step whose rows all use two experts of every MLP block."""
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
    routed: Mapping[str, tuple[RoutedRows, ...]],
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
