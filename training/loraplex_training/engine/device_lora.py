"""The linears of a frozen base with the LoRAs of several adapters, on a GPU.

The function and its gradients are those of ``segmented_lora``. All adapters of a batch share each
launch, whatever their ranks and rows:

    h  = x Aᵀ         y += h (s B)ᵀ            shrink, expand
    gu = g (s B)      gx += gu A               shrink and expand with A and B exchanged
    gA = guᵀ x        gB = s · gᵀ h            factor gradients

The factors of a batch are packed into one storage as serving's kernels read them. h, gu and the
gradients are float32.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from loraplex_kernels.formats.layout import (
    NO_PAGE,
    PAGE_RANK,
    DeviceSegments,
    LoraTables,
    LoraTarget,
    tile_rows,
)
from loraplex_kernels.triton.checks import OFFSET_ALIGN
from loraplex_kernels.triton.expand import lora_expand
from loraplex_kernels.triton.factor_gradients import lora_factor_gradients
from loraplex_kernels.triton.launch_choices import shrink_choice
from loraplex_kernels.triton.shrink import lora_shrink

from .segmented_lora import GroupedLinear, Segment, in_pieces

Ranks = tuple[tuple[int, ...], ...]  # of each segment, for each linear of the group; 0: not adapted


class DeviceProduct(torch.autograd.Function):
    """``apply(x, group, *factors)`` as in ``segmented_lora``, without dropout and gains."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: GroupedLinear, *factors: Tensor) -> Tensor:
        y = in_pieces(x, group.read().t(), group.rest)
        bounds = tuple((segment.first, segment.end) for segment in group.segments)
        pack = _Pack.of(group, factors, x)
        rows = _segments(bounds, len(x), x.device)
        planes = _shrink(x, pack.tables, rows)
        lora_expand(planes, x, pack.tables, rows, out=y)
        if group.bias is not None:
            y += group.bias
        ctx.group, ctx.segments, ctx.pack, ctx.rows = group, group.segments, pack, rows
        ctx.save_for_backward(x, planes)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), group, pack, rows = grads, ctx.group, ctx.pack, ctx.rows
        x, planes = ctx.saved_tensors
        grad = grad.contiguous()
        gx: Tensor | None = None
        if ctx.needs_input_grad[0]:  # not below the lowest adapted layer
            gx = in_pieces(grad, group.read(), group.rest)
        of_factors = torch.empty_like(pack.tables.storage, dtype=torch.float32)
        for i, columns in enumerate(group.parts):
            if not any(i in segment.members for segment in ctx.segments):
                continue
            g, back = grad[:, columns], pack.exchanged(i)
            gu = _shrink(g, back, rows)
            if gx is not None:
                lora_expand(gu, g, back, rows, out=gx)
            ranks, a_pages, b_pages = back.ranks[:, 0], back.b_pages[:, 0], back.a_pages[:, 0]
            lora_factor_gradients(gu[0, 0], x, ranks, a_pages, rows, out=of_factors)
            lora_factor_gradients(planes[0, i], g, ranks, b_pages, rows, out=of_factors)
        return gx, None, *pack.gradients(of_factors, ctx.segments)


def _shrink(x: Tensor, tables: LoraTables, rows: DeviceSegments) -> Tensor:
    """Return the planes [1, slices, pages, rows of segments, 16] of A's products."""
    n_pairs, width = rows.indices.shape[0], tables.target.in_features
    choice = shrink_choice(n_pairs, width, tables.a_pages.shape[2], x.element_size())
    return lora_shrink(x, tables, rows, choice=replace(choice, serial=True))


@dataclass(frozen=True, slots=True)
class _Pack:
    """The factors of a group in a batch; slot s holds those of segment s."""

    tables: LoraTables
    ranks: Ranks
    offsets: tuple[int, ...]  # of A and Bᵀ of each member of each segment, in elements

    @classmethod
    def of(cls, group: GroupedLinear, factors: Sequence[Tensor], x: Tensor) -> "_Pack":
        """``factors``: A [rank, in] and B [out, rank] of each member of each segment."""
        parts: list[Tensor] = []
        table = [[0] * len(group.names) for _ in group.segments]
        places = _places(group.segments)
        for (s, i), a, b in zip(places, factors[::2], factors[1::2], strict=True):
            table[s][i] = len(a)
            for part in (a, b.t() * group.segments[s].scale):
                parts += [part.reshape(-1).to(x.dtype), x.new_zeros(-part.numel() % OFFSET_ALIGN)]
        ranks = tuple(map(tuple, table))
        tables, offsets = _tables(ranks, x.shape[1], group.out_features, x.device)
        return cls(replace(tables, storage=torch.cat(parts)), ranks, offsets)

    def exchanged(self, i: int) -> LoraTables:
        """Return the tables of linear ``i`` from its outputs to its input: Bᵀ as A, A as Bᵀ."""
        one, tables = slice(i, i + 1), self.tables
        none = tables.scale[:, one].contiguous()
        return LoraTables(
            LoraTarget(
                tables.target.name, tables.target.out_features[i], (tables.target.in_features,)
            ),
            tables.storage,
            tables.ranks[:, one].contiguous(),
            tables.b_pages[:, one].contiguous(),
            tables.a_pages[:, one].contiguous(),
            none,
            none,
        )

    def gradients(self, flat: Tensor, segments: Sequence[Segment]) -> Iterator[Tensor]:
        """Yield the gradients of A and B of each member of each segment, float32."""
        offsets, target = iter(self.offsets), self.tables.target
        for s, i in _places(segments):
            rank = self.ranks[s][i]
            for width, is_b in ((target.in_features, False), (target.out_features[i], True)):
                first = next(offsets)
                factor = flat[first : first + rank * width].view(rank, width)
                yield factor.t() * segments[s].scale if is_b else factor


def _places(segments: Sequence[Segment]) -> Iterator[tuple[int, int]]:
    return ((s, i) for s, segment in enumerate(segments) for i in segment.members)


@lru_cache(maxsize=256)
def _tables(
    ranks: Ranks, n_in: int, n_out: tuple[int, ...], device: torch.device
) -> tuple[LoraTables, tuple[int, ...]]:
    """Return the tables of factors without their storage, and where each factor begins in it."""
    n_pages = max(-(-rank // PAGE_RANK) for each in ranks for rank in each)
    pages = torch.full((2, len(ranks), len(n_out), n_pages), NO_PAGE, dtype=torch.int64)
    offsets, offset = list[int](), 0
    for s, of_slot in enumerate(ranks):
        for i, rank in enumerate(of_slot):
            for side, width in enumerate((n_in, n_out[i]) if rank else ()):
                offsets.append(offset)
                for page in range(-(-rank // PAGE_RANK)):
                    pages[side, s, i, page] = offset + page * PAGE_RANK * width
                offset += -(-rank * width // OFFSET_ALIGN) * OFFSET_ALIGN
    a_pages, b_pages = pages.to(device)
    none = torch.full((len(ranks), len(n_out)), NO_PAGE, dtype=torch.int64, device=device)
    table = torch.tensor(ranks, dtype=torch.int32, device=device)
    target = LoraTarget("training", n_in, n_out)
    tables = LoraTables(target, table.new_empty(0), table, a_pages, b_pages, none, none)
    return tables, tuple(offsets)


@lru_cache(maxsize=16)
def _segments(
    bounds: tuple[tuple[int, int], ...], n_rows: int, device: torch.device
) -> DeviceSegments:
    """Return segments as serving's kernels read them: s has the rows [first, end) ``bounds[s]``."""
    lengths = [end - first for first, end in bounds]
    starts = [0, *accumulate(lengths)]
    indices = torch.cat([torch.arange(first, end) for first, end in bounds])
    pair_of = torch.full((n_rows, 1), -1)
    pair_of[indices, 0] = torch.arange(len(indices))
    block_m = tile_rows(len(indices))
    tiles = [
        (slot, starts[slot] + first, min(block_m, length - first))
        for slot, length in enumerate(lengths)
        for first in range(0, length, block_m)
    ]

    def ints(values: object) -> Tensor:
        return torch.as_tensor(values, dtype=torch.int32).to(device)

    slots = torch.arange(len(bounds))
    return DeviceSegments(
        ints(slots),
        ints(starts),
        ints(indices),
        n_rows=n_rows,
        block_m=block_m,
        tiles=ints(tiles),
        pair_of=ints(pair_of),
        pair_segments=ints(slots.repeat_interleave(torch.tensor(lengths))),
        blocks=None,
    )
