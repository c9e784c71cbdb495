"""The gradient of the LoRA operator; torch's numerical differentiation is the judge."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from loraplex_kernels.layout import NO_PAGE, LoraSegments, LoraTables, LoraTarget
from loraplex_kernels.reference import lora_apply_reference, lora_gradient_reference

TARGET = LoraTarget("qkv", 6, (5, 3))
RANKS = ((2, 3), (18, 0), (1, 2))  # of each slot and slice; 18: two pages, 0: untouched
N_ROWS = 7
SCALED = (1, 0)  # slot and slice that have a scale and a bias


def segments(*, routed: bool) -> LoraSegments:
    """Slots 1 and 0 of two runs of rows; with routing, some rows in two segments and weighted."""
    if not routed:
        rows = [[0, 2, 3], [4, 5]]
        slots, weights = [1, 0], None
    else:
        rows = [[0, 2, 3], [0, 1, 3, 5], [3, 6], []]
        slots = [0, 1, 2, 0]
        weights = torch.linspace(0.2, 1.5, 9)
    counts = torch.tensor([0, *(len(part) for part in rows)]).cumsum(0)
    flat = [row for part in rows for row in part]
    as_int = {"dtype": torch.int32}
    return LoraSegments(
        torch.tensor([*slots, -1], **as_int),  # type: ignore[call-overload]
        torch.cat([counts, counts[-1:]]).int(),
        torch.tensor(flat, **as_int),  # type: ignore[call-overload]
        weights,
    )


def place(factors: tuple[Tensor, ...], extras: Tensor) -> tuple[Tensor, LoraTables]:
    """A and Bᵀ of every slot and slice in one storage, pages of up to sixteen rank rows."""
    parts: list[Tensor] = []
    n_slots, n_slices = len(RANKS), len(TARGET.out_features)
    a_pages = torch.full((n_slots, n_slices, 2), NO_PAGE, dtype=torch.int64)
    b_pages = a_pages.clone()
    at = 0
    remaining = iter(factors)
    for slot, ranks in enumerate(RANKS):
        for i, rank in enumerate(ranks):
            for pages in (a_pages, b_pages):
                if rank == 0:
                    continue
                factor = next(remaining)
                for page, rows in enumerate(factor.split(16)):
                    pages[slot, i, page] = at
                    odd = rows.new_zeros(rows.numel() % 2)  # an odd offset means a coded page
                    parts.append(torch.cat([rows.reshape(-1), odd]))
                    at += parts[-1].numel()
    scale = torch.full((n_slots, n_slices), NO_PAGE, dtype=torch.int64)
    bias = scale.clone()
    width = TARGET.out_features[SCALED[1]]
    scale[SCALED], bias[SCALED] = at, at + width
    tables = LoraTables(torch.tensor(RANKS).int(), a_pages, b_pages, scale, bias)
    return torch.cat([*parts, extras]), tables


class Applied(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, routed: bool, extras: Tensor, x: Tensor, out: Tensor, *factors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(extras, x, *factors)
        ctx.routed = routed
        storage, tables = place(factors, extras)
        out = out.clone()
        lora_apply_reference(x, storage, TARGET, tables, segments(routed=routed), out=out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        extras, x, *factors = ctx.saved_tensors
        storage, tables = place(tuple(factors), extras)
        found = lora_gradient_reference(
            x, storage, TARGET, tables, segments(routed=ctx.routed), grads[0]
        )
        used = []
        factor = iter(factors)
        for slot, ranks in enumerate(RANKS):
            for i, rank in enumerate(ranks):
                for gradients in (found.a, found.b) if rank else ():
                    none = torch.zeros_like(next(factor))
                    used.append(gradients.get((slot, i), none))
        return (None, None, found.x, found.out, *used)


@pytest.mark.parametrize("routed", [False, True])
def test_gradients_are_what_differences_say(routed: bool) -> None:
    torch.manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    factors = [
        drawn(rank, width)
        for ranks in RANKS
        for i, rank in enumerate(ranks)
        for width in ((TARGET.in_features, TARGET.out_features[i]) if rank else ())
    ]
    extras = torch.randn(2 * TARGET.out_features[SCALED[1]], dtype=torch.float64)
    x, out = drawn(N_ROWS, TARGET.in_features), drawn(N_ROWS, sum(TARGET.out_features))
    assert torch.autograd.gradcheck(
        lambda *inputs: Applied.apply(routed, extras, *inputs),  # type: ignore[no-untyped-call]
        (x, out, *factors),
    )


def test_float32_gradients_are_those_of_float64_rounded() -> None:
    torch.manual_seed(4)
    factors = tuple(
        torch.randn(rank, width, dtype=torch.float64)
        for ranks in RANKS
        for i, rank in enumerate(ranks)
        for width in ((TARGET.in_features, TARGET.out_features[i]) if rank else ())
    )
    storage, tables = place(factors, torch.randn(10, dtype=torch.float64))
    x = torch.randn(N_ROWS, 6, dtype=torch.float64)
    grad = torch.randn(N_ROWS, 8, dtype=torch.float64)
    step = segments(routed=True)
    exact = lora_gradient_reference(x, storage, TARGET, tables, step, grad)
    found = lora_gradient_reference(x.float(), storage.float(), TARGET, tables, step, grad.float())
    torch.testing.assert_close(found.x, exact.x.float(), atol=1e-4, rtol=1e-4)
    for key, value in exact.b.items():
        torch.testing.assert_close(found.b[key], value.float(), atol=1e-4, rtol=1e-4)
