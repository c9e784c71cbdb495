"""Quantised weights: what they become, and products that are those of the dequantised ones."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loraplex_kernels.cpu import native
from loraplex_kernels.formats.quantized_weight import (
    QuantizedWeight,
    WeightFormat,
    quantize_weight,
)
from loraplex_kernels.layers.packed_linear import PackedLinear
from loraplex_kernels.layers.quantized_linear import QuantizedLinear, quantized_linear_reference

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
    scales = quantized.scales[:, 0]
    theirs = torch.fake_quantize_per_channel_affine(
        weight.float(), scales, torch.zeros(50, dtype=torch.int32), 0, -127, 127
    )
    off = (quantized.codes.float() * scales[:, None] - theirs).abs()
    assert bool((off <= 1.01 * scales[:, None]).all())  # theirs multiplies by 1 / scale: ties
    assert float((off == 0).float().mean()) > 0.99
    used = weight.float().abs().amax(-1)
    assert torch.equal(scales[used > 0], (used / 127)[used > 0])
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
    assert quantized.scales.dtype is dtype
    step = quantized.scales.float().repeat_interleave(group_size, dim=1)[:, :in_features]
    off = (quantized.dequantize().float() - weight.float()).abs()
    # the scale itself was rounded, so the largest weight may be a rounding further off
    assert bool((off <= step * (0.5 + 8 * torch.finfo(dtype).eps)).all())


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
    scales = 960 * 4 if format is not WeightFormat.INT4 else 960 * 9 * 2
    assert linear.n_bytes == 960 * 576 // (2 if format is WeightFormat.INT4 else 1) + scales


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", WIDTHS)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_product_is_that_of_the_dequantised_weights(
    format: WeightFormat, dtype: torch.dtype, in_features: int, has_bias: bool
) -> None:
    """To the bit, where native code multiplies; the oracle is the packed linear of plain ones."""
    weights = [weight_of(n, in_features, dtype, seed=n) for n in (70, 9, 33)]
    biases = [None, rows_of(1, 9, dtype)[0], None] if has_bias else [None] * 3
    quantized = [quantize_weight(weight, format) for weight in weights]
    linear = QuantizedLinear(quantized, biases)
    plain = PackedLinear([q.dequantize() for q in quantized], biases)
    for n_rows in (0, 1, 5, 33):
        x = rows_of(n_rows, in_features, dtype)
        if native.available() and plain.native is not None and in_features % 4 == 0:
            assert torch.equal(linear(x), plain(x))
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
    if native.available() and plain.native is not None:
        assert torch.equal(linear(x), plain(x))
    torch.testing.assert_close(linear(x).float(), plain(x).float(), atol=3e-2, rtol=2e-2)
    n_outputs = 103 + -103 % 32  # in whole panels where native code multiplies
    assert linear.n_bytes <= n_outputs * (-(-in_features // size)) * (
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


@pytest.mark.parametrize("format", FORMATS)
def test_a_row_has_the_same_bits_alone_and_among_others(format: WeightFormat) -> None:
    if not native.available():
        pytest.skip("native kernels are not built")
    linear = QuantizedLinear([quantize_weight(weight_of(200, 576, torch.bfloat16), format)], [None])
    x = rows_of(300, 576, torch.bfloat16)
    together = linear(x)
    for first, last in [(0, 1), (3, 4), (5, 21), (100, 165), (299, 300)]:
        assert torch.equal(linear(x[first:last]), together[first:last])


@pytest.mark.parametrize("format", FORMATS)
def test_a_weight_made_plain_in_pieces_gives_the_same(
    format: WeightFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = quantize_weight(weight_of(200, 128, torch.bfloat16), format)
    bias, x = rows_of(1, 200, torch.bfloat16)[0], rows_of(9, 128, torch.bfloat16)
    at_once = QuantizedLinear([weight], [bias])(x)
    monkeypatch.setattr("loraplex_kernels.layers.quantized_linear._SCRATCH_BYTES", 2 * 32 * 128 * 4)
    assert torch.equal(QuantizedLinear([weight], [bias])(x), at_once)
    monkeypatch.setattr("loraplex_kernels.layers.quantized_linear._REFERENCE_BYTES", 7 * 128 * 2)
    out = torch.empty_like(at_once)
    quantized_linear_reference(x, weight, bias, out=out)
    torch.testing.assert_close(out, at_once, atol=1e-2, rtol=1e-2)


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
