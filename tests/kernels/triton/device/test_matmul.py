"""The batch-invariant product equals torch's, and a row has one set of bits in every batch."""

import pytest
import torch
from torch import Tensor

from loraplex_kernels.triton.matmul import matmul_triton

LIMITS = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def _values(*shape: int, dtype: torch.dtype, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 16, 1), (70, 41, 67), (3, 128, 64)])
def test_products_equal_torch(
    device: torch.device, dtype: torch.dtype, rows: int, inputs: int, outputs: int
) -> None:
    a = _values(2, rows, inputs + 3, dtype=dtype, device=device, seed=1)[:, :, :inputs]
    weight = _values(2, outputs, inputs, dtype=dtype, device=device, seed=2)
    bias = _values(outputs, dtype=dtype, device=device, seed=3)
    around = torch.full((2, rows + 2, outputs + 5), torch.nan, dtype=dtype, device=device)
    for added in (None, bias):
        out = around[:, 1:-1, :outputs]
        matmul_triton(a, weight.transpose(1, 2), added, out=out)
        wanted = a.double() @ weight.double().transpose(1, 2)
        wanted = wanted if added is None else wanted + added.double()
        limit = LIMITS[dtype]
        size = float(wanted.abs().max())
        torch.testing.assert_close(out.double(), wanted, rtol=limit, atol=limit * size)
    assert int(around.isnan().sum()) == around.numel() - out.numel()


@pytest.mark.parametrize("dtype", LIMITS)
def test_a_row_alone_has_the_bits_it_has_in_a_batch(
    device: torch.device, dtype: torch.dtype
) -> None:
    x = _values(1, 131, 200, dtype=dtype, device=device, seed=4)
    weight = _values(1, 90, 200, dtype=dtype, device=device, seed=5).transpose(1, 2)
    together = x.new_empty(1, 131, 90)
    matmul_triton(x, weight, out=together)
    for first, end in ((0, 1), (64, 65), (130, 131), (5, 40), (60, 131)):
        alone = x.new_empty(1, end - first, 90)
        matmul_triton(x[:, first:end], weight, out=alone)
        assert torch.equal(alone, together[:, first:end])


def test_no_inputs_give_the_bias(device: torch.device) -> None:
    bias = _values(4, dtype=torch.float32, device=device, seed=6)
    out = torch.full((1, 3, 4), torch.nan, device=device)
    matmul_triton(out.new_empty(1, 3, 0), out.new_empty(1, 0, 4), bias, out=out)
    assert torch.equal(out, bias.expand(1, 3, 4))


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    a = torch.zeros(1, 3, 8, device=device)
    with pytest.raises(ValueError, match="Z, M, K"):
        matmul_triton(a, a, out=a)
    with pytest.raises(ValueError, match="columns"):
        matmul_triton(a, a.transpose(1, 2), out=torch.zeros(1, 3, 6, device=device)[:, :, ::2])
    with pytest.raises(ValueError, match="one of floats"):
        matmul_triton(a.double(), a.double().transpose(1, 2), out=a.new_empty(1, 3, 3))
