"""Linears on quantised weights equal the reference, for any width, within their tensors alone."""

import dataclasses

import pytest
import torch
from torch import Tensor

from loraplex_kernels.formats.quantized_weight import (
    QuantizedWeight,
    WeightFormat,
    quantize_weight,
)
from loraplex_kernels.layers.quantized_linear import quantized_linear_reference
from loraplex_kernels.triton.quantized_linear import quantized_linear_triton

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# outputs, inputs: less than a tile, cut groups and blocks, several of both
SHAPES = [(1, 2), (17, 41), (40, 192), (33, 300)]


def _weight(shape: tuple[int, int], dtype: torch.dtype, format: WeightFormat) -> QuantizedWeight:
    """With e4m3's subnormals among the codes, and a row of zeros."""
    generator = torch.Generator().manual_seed(shape[1])
    weight = torch.randn(shape, generator=generator) * 0.2
    weight[:, ::5] *= 1e-3
    weight[0] = 0
    return quantize_weight(weight.to(dtype), format)


def _rows(n: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Rows with 7 unused columns behind them, and 3 unused rows, that are no numbers."""
    values = torch.randn(n, width, generator=torch.Generator().manual_seed(n))
    padded = torch.full((n + 3, width + 7), torch.nan)
    padded[:n, :width] = values
    return padded.to(dtype).to(device)[:n, :width]


def _behind(tensor: Tensor, device: torch.device) -> Tensor:
    """The same at the front of memory that ends in what must not be read: NaN in every dtype."""
    is_float = tensor.dtype.is_floating_point
    more = torch.full((512,), torch.nan if is_float else 127, dtype=tensor.dtype)
    return torch.cat([tensor.reshape(-1), more]).to(device)[: tensor.numel()].view(tensor.shape)


def _on(weight: QuantizedWeight, device: torch.device) -> QuantizedWeight:
    zeros = weight.zeros
    return dataclasses.replace(
        weight,
        codes=_behind(weight.codes, device),
        scales=_behind(weight.scales, device),
        zeros=None if zeros is None else _behind(zeros, device),
    )


@pytest.mark.parametrize("format", list(WeightFormat))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_the_reference(
    device: torch.device, format: WeightFormat, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    n_out, width = shape
    weight = _weight(shape, dtype, format)
    for n_rows, has_bias in ((1, False), (19, True)):
        x = _rows(n_rows, width, dtype, device)
        bias = _behind(torch.linspace(-1, 1, n_out).to(dtype), device) if has_bias else None
        around = torch.full((n_rows + 2, n_out + 3), torch.nan, dtype=dtype, device=device)
        out = around[1:-1, :n_out]
        quantized_linear_triton(x, _on(weight, device), bias, out=out)
        wanted = torch.empty(n_rows, n_out, dtype=dtype)
        host_bias = None if bias is None else bias.cpu()
        # contiguous: torch's own bfloat16 product multiplies what lies behind an odd row by zero
        quantized_linear_reference(x.cpu().contiguous(), weight, host_bias, out=wanted)
        limit = TOLERANCE[dtype]
        torch.testing.assert_close(out.cpu(), wanted, rtol=limit, atol=limit)
        assert int(around.isnan().sum()) == around.numel() - out.numel()


@pytest.mark.parametrize("format", [WeightFormat.INT8, WeightFormat.FP8])
@pytest.mark.parametrize(("width", "group_size"), [(256, 128), (100, 32)])
def test_groups_of_whole_bytes_have_scales_of_their_own(
    device: torch.device, format: WeightFormat, width: int, group_size: int
) -> None:
    whole = _weight((20, width), torch.bfloat16, format)
    n_groups = -(-width // group_size)
    scales = whole.scales * torch.linspace(0.5, 2, n_groups)
    weight = dataclasses.replace(whole, scales=scales, group_size=group_size)
    x = _rows(5, width, torch.bfloat16, device)
    out, wanted = (torch.empty(5, 20, dtype=torch.bfloat16, device=at) for at in (device, "cpu"))
    quantized_linear_triton(x, _on(weight, device), None, out=out)
    quantized_linear_reference(x.cpu().contiguous(), weight, None, out=wanted)
    torch.testing.assert_close(out.cpu(), wanted, rtol=1.6e-2, atol=1.6e-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_groups_of_int4_have_zeros_of_their_own(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    n_out, width = shape
    plain = _weight(shape, dtype, WeightFormat.INT4)
    zeros = torch.arange(plain.scales.numel()).remainder(16).to(torch.uint8)
    weight = dataclasses.replace(plain, zeros=zeros.view(plain.scales.shape))
    x = _rows(5, width, dtype, device)
    out, wanted = (torch.empty(5, n_out, dtype=dtype, device=at) for at in (device, "cpu"))
    quantized_linear_triton(x, _on(weight, device), None, out=out)
    quantized_linear_reference(x.cpu().contiguous(), weight, None, out=wanted)
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(out.cpu(), wanted, rtol=limit, atol=limit)
    assert not torch.equal(weight.dequantize(), plain.dequantize())


@pytest.mark.parametrize("format", list(WeightFormat))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_has_the_same_bits_in_decode_and_in_prefill(
    device: torch.device, format: WeightFormat, dtype: torch.dtype
) -> None:
    weight = _on(_weight((33, 192), dtype, format), device)
    x = _rows(67, 192, dtype, device)
    together = torch.empty(67, 33, dtype=dtype, device=device)
    quantized_linear_triton(x, weight, None, out=together)
    for first, last in ((0, 1), (5, 21), (10, 40), (66, 67)):
        out = torch.empty(last - first, 33, dtype=dtype, device=device)
        quantized_linear_triton(x[first:last], weight, None, out=out)
        assert torch.equal(out, together[first:last])


def test_every_code_of_e4m3_becomes_its_value(device: torch.device) -> None:
    """All 254 of them, against torch's own cast; NaN does not occur among weights."""
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0
    weight = QuantizedWeight(
        WeightFormat.FP8, codes[:, None], torch.ones(256, 1), 1, 1, torch.float32
    )
    out = torch.empty(1, 256, device=device)
    quantized_linear_triton(torch.ones(1, 1, device=device), _on(weight, device), None, out=out)
    assert torch.equal(out[0].cpu(), codes.view(torch.float8_e4m3fn).float())


def test_what_does_not_fit_is_refused_before_the_launch(device: torch.device) -> None:
    weight = _weight((40, 192), torch.bfloat16, WeightFormat.INT4).to(device)
    x = _rows(5, 192, torch.bfloat16, device)
    out = torch.empty(5, 40, dtype=torch.bfloat16, device=device)
    bad = [
        ("x is", (x[:, :64], weight, None, out)),
        ("x is torch.float16", (x.half(), weight, None, out)),
        ("contiguous along", (x.T.contiguous().T, weight, None, out)),
        ("bias is", (x, weight, x[0, :39], out)),
    ]
    for said, (rows, given, bias, into) in bad:
        with pytest.raises(ValueError, match=said):
            quantized_linear_triton(rows, given, bias, out=into)
    assert weight.group_size == 64
    odd = dataclasses.replace(weight, group_size=192, scales=weight.scales[:, :1].contiguous())
    with pytest.raises(ValueError, match="32, 64 or 128 inputs, not 192"):
        quantized_linear_triton(x, odd, None, out=out)
