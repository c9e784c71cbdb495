"""Training's linears have the same outputs and gradients by the kernels as by torch's products."""

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from loraplex_training.engine.device_lora import DeviceProduct
from loraplex_training.engine.segmented_lora import GroupedLinear, Segment, TorchProduct

N_ROWS, N_IN, N_OUT = 40, 41, (33, 20, 64)
SEGMENTS = (
    Segment(0, 5, 2.0, (0, 1, 2)),
    Segment(5, 23, 0.5, (0, 2)),  # two pages of ranks and more than one tile of rows
    Segment(23, 23, 1.0, (1,)),  # no rows
    Segment(30, 40, 3.0, (1,)),  # rows before it have no adapter
)
RANKS = (3, 18, 4, 8)
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Gradients(NamedTuple):
    y: Tensor
    x: Tensor | None
    factors: list[Tensor]


def _draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 4


def _computed(
    product: type[torch.autograd.Function],
    dtype: torch.dtype,
    device: torch.device,
    *,
    chosen: Sequence[int] = range(len(SEGMENTS)),
    with_x: bool = True,
) -> Gradients:
    weights, bias = _draw(sum(N_OUT), N_IN, seed=1), _draw(sum(N_OUT), seed=2)
    weights, bias = weights.to(device, dtype), bias.to(device, dtype)
    group = GroupedLinear(("q", "k", "v"), N_OUT, lambda: weights, bias, lambda: None)
    factors = []
    for s in chosen:
        group.segments.append(SEGMENTS[s])
        for i in SEGMENTS[s].members:
            shapes = (RANKS[s], N_IN), (N_OUT[i], RANKS[s])
            factors += [_draw(*shape, seed=10 * s + i).to(device) for shape in shapes]
    factors = [factor.requires_grad_() for factor in factors]
    x = _draw(N_ROWS, N_IN, seed=3).to(device, dtype).requires_grad_(with_x)
    y = product.apply(x, group, *factors)
    assert isinstance(y, Tensor)
    y.backward(_draw(*y.shape, seed=4).to(device, dtype))
    grads = [factor.grad for factor in factors]
    return Gradients(y.detach(), x.grad, [grad for grad in grads if grad is not None])


def _assert_close(ours: Tensor, theirs: Tensor, limit: float) -> None:
    size = float(theirs.float().abs().max())
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=limit, atol=limit * size)


@pytest.mark.parametrize("dtype", LIMITS)
def test_outputs_and_gradients_equal_those_of_torch(
    device: torch.device, dtype: torch.dtype
) -> None:
    ours = _computed(DeviceProduct, dtype, device)
    theirs = _computed(TorchProduct, dtype, device)
    assert ours.x is not None
    assert theirs.x is not None
    assert len(ours.factors) == 2 * sum(len(segment.members) for segment in SEGMENTS)
    pairs = zip((ours.y, ours.x, *ours.factors), (theirs.y, theirs.x, *theirs.factors), strict=True)
    for our, their in pairs:
        assert our.shape == their.shape
        if our.numel() and bool(their.any()):
            _assert_close(our, their, LIMITS[dtype])
        else:
            assert torch.equal(our, their)  # the gradient of an adapter without rows


def test_an_adapter_has_the_same_bits_beside_others(device: torch.device) -> None:
    together = _computed(DeviceProduct, torch.float32, device)
    alone = _computed(DeviceProduct, torch.float32, device, chosen=[1])
    first = 2 * len(SEGMENTS[0].members)
    for i, gradient in enumerate(alone.factors):
        assert torch.equal(gradient, together.factors[first + i])
    rows = slice(SEGMENTS[1].first, SEGMENTS[1].end)
    assert torch.equal(alone.y[rows], together.y[rows])


def test_the_lowest_adapted_layer_has_no_gradient_of_its_input(device: torch.device) -> None:
    with_x = _computed(DeviceProduct, torch.float32, device, chosen=[0])
    without = _computed(DeviceProduct, torch.float32, device, chosen=[0], with_x=False)
    assert without.x is None
    assert all(map(torch.equal, with_x.factors, without.factors))
