"""Quantised weights: what they become, their products, and their blocks on a CPU."""

from dataclasses import replace

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from loraplex_kernels.cpu.code_blocks import as_blocks
from loraplex_kernels.formats.quantized_weight import (
    QuantizedWeight,
    WeightFormat,
    quantize_weight,
)
from loraplex_kernels.layers.packed_linear import PackedLinear
from loraplex_kernels.layers.quantized_linear import (
    QuantizedLinear,
    coded_linear,
    quantized_linear_reference,
)

FORMATS = list(WeightFormat)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [2, 41, 64, 96, 192, 576]  # none, some and all groups of 64 and 128 inputs are full


def weight_of(n_out: int, in_features: int, dtype: torch.dtype, seed: int = 3) -> Tensor:
    """With rows of zeros, of one large value and of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n_out, in_features, generator=generator) * 0.05
    weight[0] = 0
    weight[n_out // 2, in_features // 2] = 4.0
    weight[n_out // 3] *= 1e-3
    return weight.to(dtype)


def rows_of(n_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n_rows, width, generator=torch.Generator().manual_seed(n_rows)).to(dtype)


def with_zeros(weight: QuantizedWeight) -> QuantizedWeight:
    """The same codes of int4 with a zero of its own for every group."""
    generator = torch.Generator().manual_seed(weight.shape[0])
    zeros = torch.randint(0, 16, weight.scales.shape, generator=generator, dtype=torch.uint8)
    return replace(weight, zeros=zeros)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", WIDTHS)
def test_int8_is_what_torch_quantises_to(in_features: int, dtype: torch.dtype) -> None:
    weight = weight_of(50, in_features, dtype)
    quantized = quantize_weight(weight, WeightFormat.INT8)
    scales = quantized.scales[:, 0].float()
    theirs = torch.fake_quantize_per_channel_affine(
        weight.float(), scales, torch.zeros(50, dtype=torch.int32), 0, -127, 127
    )
    off = (quantized.codes.float() * scales[:, None] - theirs).abs()
    assert bool((off <= 1.01 * scales[:, None]).all())  # theirs multiplies by 1 / scale: ties
    assert float((off == 0).float().mean()) > 0.99
    used = weight.float().abs().amax(-1)
    assert torch.equal(scales[used > 0], (used / 127).half().float()[used > 0])
    wanted = quantized.codes.float() * scales[:, None]
    torch.testing.assert_close(quantized.dequantize(), wanted.to(dtype), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", WIDTHS)
def test_fp8_is_what_torch_casts_to(in_features: int, dtype: torch.dtype) -> None:
    weight = weight_of(50, in_features, dtype)
    quantized = quantize_weight(weight, WeightFormat.FP8)
    cast = (weight.float() / quantized.scales).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(quantized.codes, cast.view(torch.uint8))
    assert torch.equal(quantized.dequantize(), (cast.float() * quantized.scales).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("in_features", "group_size"), [(2, 64), (41, 64), (192, 64), (256, 128), (576, 64)]
)
def test_int4_is_within_half_a_step_of_its_group(
    in_features: int, group_size: int, dtype: torch.dtype
) -> None:
    weight = weight_of(50, in_features, dtype)
    quantized = quantize_weight(weight, WeightFormat.INT4)
    assert quantized.group_size == group_size
    assert quantized.scales.dtype is torch.float16
    step = quantized.scales.float().repeat_interleave(group_size, dim=1)[:, :in_features]
    off = (quantized.dequantize().float() - weight.float()).abs()
    # the scale itself was rounded, so the largest weight may be a rounding further off
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float16).eps)
    smallest = 2**-24  # scale, of rows of tiny weights
    assert bool((off <= step * (0.5 + 8 * eps) + 7 * smallest).all())


def test_halves_of_a_group_lie_in_one_byte() -> None:
    """The layout that kernels read, by hand: inputs 0 and 32 of a group of 64."""
    weight = torch.zeros(1, 64)
    weight[0, 0], weight[0, 32], weight[0, 63] = 7.0, -3.0, 1.0
    quantized = quantize_weight(weight, WeightFormat.INT4)
    low, high = quantized.codes & 15, quantized.codes >> 4
    assert (int(low[0, 0]), int(high[0, 0]), int(high[0, 31])) == (15, 5, 9)


@pytest.mark.parametrize("format", FORMATS)
def test_a_quantised_weight_takes_the_bytes_it_says(format: WeightFormat) -> None:
    weight = weight_of(960, 576, torch.bfloat16)
    linear = QuantizedLinear([quantize_weight(weight, format)], [None])
    scales = {WeightFormat.INT8: 960 * 2, WeightFormat.FP8: 960 * 4, WeightFormat.INT4: 960 * 9 * 2}
    codes = 960 * 576 // (2 if format is WeightFormat.INT4 else 1)
    assert linear.n_bytes == codes + scales[format]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", WIDTHS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_is_that_of_the_dequantised_weights(
    format: WeightFormat, dtype: torch.dtype, in_features: int, has_bias: bool
) -> None:
    """The oracle is the packed linear of plain weights."""
    weights = [weight_of(n, in_features, dtype, seed=n) for n in (70, 9, 33)]
    biases = [None, rows_of(1, 9, dtype)[0], None] if has_bias else [None] * 3
    quantized = [quantize_weight(weight, format) for weight in weights]
    linear = QuantizedLinear(quantized, biases)
    plain = PackedLinear([q.dequantize() for q in quantized], biases)
    for n_rows in (0, 1, 5, 33):
        x = rows_of(n_rows, in_features, dtype)
        tolerance = 1e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(linear(x), plain(x), atol=tolerance, rtol=tolerance)
        assert torch.equal(linear.argmax(x), linear(x).float().argmax(-1))
    for i, given in enumerate(quantized):
        assert torch.equal(linear.part(i), given.dequantize())
    assert torch.equal(linear.matrix(), torch.cat([q.dequantize() for q in quantized]))
    assert (linear.bias is None) == (not has_bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", [32, 96, 256, 576])
def test_zeros_of_groups_are_taken_off_their_codes(dtype: torch.dtype, in_features: int) -> None:
    weights = [
        quantize_weight(weight_of(n, in_features, dtype, seed=n), WeightFormat.INT4)
        for n in (70, 33)
    ]
    shifted = with_zeros(weights[0])
    codes, size = weights[0].single_codes().float(), weights[0].group_size
    assert shifted.zeros is not None
    zeros, scales = (
        tensor.float().repeat_interleave(size, dim=1)[:, :in_features]
        for tensor in (shifted.zeros, shifted.scales)
    )
    wanted = ((codes - zeros) * scales).to(dtype)
    assert torch.equal(shifted.dequantize(), wanted)
    linear = QuantizedLinear([shifted, weights[1]], [None, None])  # whose zeros are 8
    plain = PackedLinear([wanted, weights[1].dequantize()], [None, None])
    assert torch.equal(linear.matrix(), plain.matrix())
    x = rows_of(5, in_features, dtype)
    torch.testing.assert_close(linear(x).float(), plain(x).float(), atol=3e-2, rtol=2e-2)
    assert linear.n_bytes <= 103 * (-(-in_features // size)) * (
        size // 2 + weights[0].scales.element_size() + 1
    )


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("in_features", "inputs", "group_size"),
    [
        (512, slice(256, 384), 128),
        (576, slice(192, 384), 64),
        (320, slice(160, 320), 32),  # groups of 64 become smaller ones
        (96, slice(64, 96), 64),  # the last group is short
        (576, slice(0, 576), 64),
    ],
)
@pytest.mark.parametrize("zeros", [False, True])
def test_a_part_has_the_weights_of_the_whole(
    format: WeightFormat, in_features: int, inputs: slice, group_size: int, zeros: bool
) -> None:
    whole = quantize_weight(weight_of(70, in_features, torch.bfloat16), format)
    if zeros and format is WeightFormat.INT4:
        whole = with_zeros(whole)
    part = whole.cut(slice(7, 40), inputs)
    assert torch.equal(part.dequantize(), whole.dequantize()[7:40, inputs])
    if format is WeightFormat.INT4:
        assert part.group_size == group_size
    assert part.codes.untyped_storage().nbytes() == part.codes.nbytes  # the whole can be freed


def test_groups_of_bytes_are_cut_where_they_can_be() -> None:
    whole = quantize_weight(weight_of(20, 256, torch.bfloat16), WeightFormat.INT8)
    grouped = replace(whole, scales=whole.scales * torch.tensor([1.0, 3.0]), group_size=128)
    part = grouped.cut(slice(None), slice(64, 192))
    assert part.group_size == 64
    assert torch.equal(part.dequantize(), grouped.dequantize()[:, 64:192])
    with pytest.raises(ValueError, match="inputs 16 … 240 of 256 do not begin and end with groups"):
        grouped.cut(slice(None), slice(16, 240))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_features", [64, 96, 576])
@pytest.mark.parametrize("kind", ["int8", "int4", "int4 with zeros"])
def test_on_a_cpu_codes_become_blocks_of_gguf(
    kind: str, in_features: int, dtype: torch.dtype
) -> None:
    """gguf-py reads them as the same weights."""
    weight = quantize_weight(weight_of(70, in_features, dtype), WeightFormat(kind[:4]))
    if "zeros" in kind:
        weight = with_zeros(weight)
    blocks = as_blocks(weight)
    if "zeros" in kind and dtype is torch.float32:
        assert blocks is None  # offsets in float16 would be others
        return
    assert blocks is not None
    read = dequantize(blocks.rows.numpy(), GGMLQuantizationType(blocks.type.number))
    exact = replace(weight, dtype=torch.float32).dequantize()
    scales = weight.scales.float().repeat_interleave(weight.group_size, dim=1)[:, :in_features]
    off = (torch.from_numpy(read) - exact).abs()
    assert bool((off <= (scales * 15 / 2**11 if "zeros" in kind else 0)).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_without_blocks_are_plain_on_a_cpu(dtype: torch.dtype) -> None:
    fp8 = quantize_weight(weight_of(70, 64, dtype), WeightFormat.FP8)
    narrow = quantize_weight(weight_of(70, 48, dtype), WeightFormat.INT8)  # 1½ blocks
    int8 = quantize_weight(weight_of(70, 64, dtype), WeightFormat.INT8)
    tiny = replace(int8, scales=torch.full((70, 1), 1e-7))  # float16 has no such scale
    for weight in (fp8, narrow, tiny):
        linear = coded_linear([weight], [None])
        assert isinstance(linear, PackedLinear)
        assert torch.equal(linear.matrix(), weight.dequantize())


def test_the_reference_in_pieces_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = quantize_weight(weight_of(200, 128, torch.float32), WeightFormat.INT4)
    bias, x = rows_of(1, 200, torch.float32)[0], rows_of(9, 128, torch.float32)
    at_once, in_pieces = torch.empty(9, 200), torch.empty(9, 200)
    quantized_linear_reference(x, weight, bias, out=at_once)
    monkeypatch.setattr("loraplex_kernels.layers.quantized_linear._REFERENCE_BYTES", 7 * 128 * 4)
    quantized_linear_reference(x, weight, bias, out=in_pieces)
    torch.testing.assert_close(in_pieces, at_once, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_strided_rows_are_read_and_written_in_place(format: WeightFormat) -> None:
    linear = QuantizedLinear([quantize_weight(weight_of(48, 32, torch.bfloat16), format)], [None])
    wide = rows_of(9, 80, torch.bfloat16)
    out = torch.full((9, 100), 7.0, dtype=torch.bfloat16)
    linear.into(wide[:, 16:48], out[:, 20:68])
    assert torch.equal(out[:, 20:68], linear(wide[:, 16:48].contiguous()))
    assert bool((out[:, :20] == 7).all())
    assert bool((out[:, 68:] == 7).all())
    across = wide[:, 16:48].T.contiguous().T
    assert across.stride(1) != 1
    assert torch.equal(linear(across), out[:, 20:68])


def test_what_does_not_fit_is_refused() -> None:
    weight = weight_of(48, 64, torch.float32)
    int8, fp8 = (quantize_weight(weight, WeightFormat(name)) for name in ("int8", "fp8"))
    with pytest.raises(ValueError, match="quantised differently"):
        QuantizedLinear([int8, fp8], [None, None])
    with pytest.raises(ValueError, match="2 weights but 1 biases"):
        QuantizedLinear([int8, int8], [None])
    with pytest.raises(ValueError, match=r"needs torch.float32 rows \[T, 64\]"):
        QuantizedLinear([int8], [None])(torch.zeros(3, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="not finite"):
        quantize_weight(torch.full((2, 64), float("nan")), WeightFormat.INT8)
    with pytest.raises(ValueError, match=r"int4 codes of \[48, 64\] in groups of 64"):
        QuantizedWeight(WeightFormat.INT4, int8.codes, int8.scales, 64, 64, torch.float32)
    with pytest.raises(ValueError, match="zeros are uint8 beside each scale of int4"):
        replace(int8, zeros=torch.zeros_like(int8.scales, dtype=torch.uint8))
