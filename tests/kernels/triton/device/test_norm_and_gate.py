"""RMSNorm and the MLP's gate equal the reference, for any width, within rows alone."""

import pytest
import torch
from torch import Tensor

from loraplex_kernels.reference.model_ops import (
    add_rms_norm_reference,
    rms_norm_reference,
    silu_mul_reference,
)
from loraplex_kernels.triton.rms_norm import norm_heads_triton, rms_norm_triton
from loraplex_kernels.triton.silu_mul import silu_mul_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ULPS = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def _rows(n: int, width: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Rows with 7 unused columns behind them that are no numbers."""
    generator = torch.Generator().manual_seed(seed)
    values = 3 * torch.randn(n, width, generator=generator)
    padded = torch.cat((values, torch.full((n, 7), torch.nan)), dim=1).to(dtype).to(device)
    return padded[:, :width]


def _assert_close(found: Tensor, wanted: Tensor) -> None:
    limit = ULPS[found.dtype]
    torch.testing.assert_close(found.float(), wanted.float(), rtol=limit, atol=limit)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 33, 64, 576])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_equal_the_reference(
    device: torch.device, dtype: torch.dtype, width: int, offset: float
) -> None:
    weight = _rows(1, width, dtype, device, seed=1)[0].contiguous()
    x = _rows(5, width, dtype, device)
    around = torch.full((7, width + 3), torch.nan, dtype=dtype, device=device)
    out = around[1:6, :width]
    rms_norm_triton(x, weight, 1e-5, out=out, offset=offset)
    _assert_close(out, rms_norm_reference(x, weight, 1e-5, offset=offset))
    assert int(around.isnan().sum()) == around.numel() - out.numel()
    residual = _rows(5, width, dtype, device, seed=2)
    wanted_residual = residual.clone()
    wanted = add_rms_norm_reference(x, wanted_residual, weight, 1e-5, offset=offset)
    rms_norm_triton(x, weight, 1e-5, out=out, offset=offset, residual=residual)
    assert torch.equal(residual, wanted_residual)
    _assert_close(out, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [33, 64])
def test_norms_of_heads_equal_the_norm_of_each(
    device: torch.device, dtype: torch.dtype, width: int
) -> None:
    n_heads, n_kv_heads = 3, 2
    weights = [_rows(1, width, dtype, device, seed=seed)[0].contiguous() for seed in (1, 2)]
    qkv = _rows(5, (n_heads + 2 * n_kv_heads) * width, dtype, device)
    before = qkv.clone()
    norm_heads_triton(qkv, *weights, 1e-5, n_heads=n_heads, n_kv_heads=n_kv_heads)
    for head in range(n_heads + 2 * n_kv_heads):
        columns = slice(head * width, (head + 1) * width)
        wanted = before[:, columns]
        if head < n_heads + n_kv_heads:
            wanted = rms_norm_reference(wanted, weights[head >= n_heads], 1e-5)
        _assert_close(qkv[:, columns], wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("width", [1, 17, 1500])
def test_gates_equal_the_reference(
    device: torch.device, dtype: torch.dtype, act: str, width: int
) -> None:
    gate_up = _rows(4, 2 * width, dtype, device)
    gate_up[0] *= 20  # where the exponential is 0 or infinite
    around = torch.full((6, width + 3), torch.nan, dtype=dtype, device=device)
    out = around[1:5, :width]
    silu_mul_triton(gate_up, out=out, act=act)
    exact = gate_up.double() if dtype is torch.float32 else gate_up
    _assert_close(out, silu_mul_reference(exact, act=act))
    assert int(around.isnan().sum()) == around.numel() - out.numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_alone(device: torch.device, dtype: torch.dtype) -> None:
    x, weight = _rows(4, 100, dtype, device), _rows(1, 100, dtype, device, seed=1)[0].contiguous()
    together, alone = torch.empty(4, 100, dtype=dtype, device=device), torch.empty_like(x[:1])
    rms_norm_triton(x, weight, 1e-5, out=together)
    for row in range(4):
        rms_norm_triton(x[row : row + 1], weight, 1e-5, out=alone)
        assert torch.equal(alone[0], together[row])


def test_shapes_that_do_not_fit_are_refused(device: torch.device) -> None:
    x, weight = torch.zeros(2, 8, device=device), torch.zeros(8, device=device)
    with pytest.raises(ValueError, match=r"weight \(7,\)"):
        rms_norm_triton(x, weight[:7], 1e-5, out=x)
    with pytest.raises(ValueError, match="beside"):
        rms_norm_triton(x, weight, 1e-5, out=x, residual=x[:1])
    with pytest.raises(ValueError, match="contiguous along the width"):
        rms_norm_triton(x[:, ::2], weight[:4], 1e-5, out=x[:, :4])
    with pytest.raises(ValueError, match="unknown activation 'relu'"):
        silu_mul_triton(x, out=x[:, :4], act="relu")
    with pytest.raises(ValueError, match=r"out \(2, 8\)"):
        silu_mul_triton(x, out=x)
