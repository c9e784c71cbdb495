"""Weights in the blocks of a GGUF file: what gguf-py reads of them, and their products."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from loraplex_kernels.cpu import native
from loraplex_kernels.cpu.gguf_weight import BLOCK_TYPES, BlockType, GgufWeight
from loraplex_kernels.layers.block_linear import BlockLinear, block_linear
from loraplex_kernels.layers.packed_linear import PackedLinear
from tests.support.bases.gguf_checkpoint import blocks_of

pytestmark = pytest.mark.skipif(not native.available(), reason="no native kernels here")
_TYPES = pytest.mark.parametrize("type", BLOCK_TYPES.values(), ids=lambda type: type.name)
_N_ROWS = (1, 2, 6, 7, 16, 61)


def weight_of(type: BlockType, n_out: int, in_features: int, dtype: torch.dtype) -> GgufWeight:
    generator = torch.Generator().manual_seed(n_out)
    values = torch.randn(n_out, in_features, generator=generator)
    blocks = blocks_of(values, GGMLQuantizationType(type.number))
    return GgufWeight(type, torch.from_numpy(blocks), dtype)


def as_gguf_reads(weight: GgufWeight) -> Tensor:
    return torch.from_numpy(
        dequantize(weight.rows.numpy(), GGMLQuantizationType(weight.type.number))
    )


def rows_of(n_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """With a row of zeros and values of very different sizes."""
    rows = torch.randn(n_rows, width, generator=torch.Generator().manual_seed(n_rows))
    rows[-1, : width // 2] = 0
    rows[0, ::32] *= 30
    return rows.to(dtype)


def in_eight_bits(x: Tensor) -> Tensor:
    """Each 32 values as whole multiples of 1/127 of the largest, which is computed in float32."""
    blocks = x.float().view(x.shape[0], -1, 32)
    largest = blocks.abs().amax(-1, keepdim=True)
    inverse = torch.full_like(largest, 127) / largest  # ``127 / largest`` rounds twice
    codes = torch.where(largest > 0, blocks * inverse, 0.0).round()
    return (codes.double() * (largest / 127).double()).view(x.shape)


@_TYPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_read_are_those_of_gguf_py(type: BlockType, dtype: torch.dtype) -> None:
    weights = [weight_of(type, n_out, 512, dtype) for n_out in (70, 33)]
    linear = block_linear(weights, [None, None])
    assert isinstance(linear, BlockLinear)
    expected = [as_gguf_reads(weight).to(dtype) for weight in weights]
    for i, wanted in enumerate(expected):
        assert torch.equal(weights[i].dequantize(), wanted)
        assert torch.equal(linear.part(i), wanted)
    ids = torch.tensor([0, 102, 31, 32, 70, 70])
    assert torch.equal(linear.embed(ids), torch.cat(expected)[ids])
    assert torch.equal(weights[0].take(ids[:1]), expected[0][:1])


@_TYPES
def test_in_float32_products_have_the_bits_of_the_dequantised_weights(
    type: BlockType, each_kernel_set: Iterator[str]
) -> None:
    weight = weight_of(type, 70, 768, torch.float32)
    bias = rows_of(1, 70, torch.float32)[0]
    linear, plain = BlockLinear([weight], [bias]), PackedLinear([as_gguf_reads(weight)], [bias])
    for _ in each_kernel_set:
        for n_rows in _N_ROWS:
            x = rows_of(n_rows, 768, torch.float32)
            assert torch.equal(linear(x), plain(x))
            assert torch.equal(linear.argmax(x), plain.argmax(x))


@_TYPES
def test_in_bfloat16_inputs_are_rounded_to_eight_bits_and_nothing_else(
    type: BlockType, each_kernel_set: Iterator[str]
) -> None:
    weight = weight_of(type, 70, 768, torch.bfloat16)
    linear = BlockLinear([weight], [None])
    exact = as_gguf_reads(weight).double()
    for _ in each_kernel_set:
        for n_rows in _N_ROWS:
            x = rows_of(n_rows, 768, torch.bfloat16)
            expected, actual = in_eight_bits(x) @ exact.t(), linear(x)
            sizes = in_eight_bits(x).abs() @ exact.abs().t()
            # a step of bfloat16, and float32 sums of 768 products
            allowed = expected.abs() / 256 + sizes * 1e-5
            assert bool(((actual.double() - expected).abs() <= allowed).all())
            assert torch.equal(linear.argmax(x), actual.float().argmax(-1))


@_TYPES
def test_a_row_has_the_same_bits_in_every_batch(
    type: BlockType, each_kernel_set: Iterator[str]
) -> None:
    linear = BlockLinear([weight_of(type, 70, 768, torch.bfloat16)], [None])
    x = rows_of(500, 768, torch.bfloat16)
    for _ in each_kernel_set:
        whole = linear(x)
        for first, last in pairwise([0, 1, 3, 10, 40, 100, 500]):
            assert torch.equal(linear(x[first:last]), whole[first:last])


def test_linears_of_several_types_are_one_product() -> None:
    types = [BLOCK_TYPES[number] for number in (12, 12, 14, 8)]
    weights = [
        weight_of(type, n_out, 256, torch.float32)
        for type, n_out in zip(types, (96, 32, 64, 33), strict=True)
    ]
    linear = block_linear(weights, [None] * 4)
    assert isinstance(linear, BlockLinear)
    plain = PackedLinear([as_gguf_reads(weight) for weight in weights], [None] * 4)
    x = rows_of(9, 256, torch.float32)
    assert torch.equal(linear(x), plain(x))
    part = torch.empty(9, 64)
    linear.into_part(2, x, part)
    assert torch.equal(part, plain(x)[:, 128:192])


def test_types_that_change_within_a_panel_are_dequantised() -> None:
    weights = [weight_of(BLOCK_TYPES[number], 33, 256, torch.float32) for number in (12, 14)]
    linear = block_linear(weights, [None, None])
    assert isinstance(linear, PackedLinear)
    assert torch.equal(linear.matrix(), torch.cat([as_gguf_reads(weight) for weight in weights]))


def test_values_that_are_not_finite_stay_in_their_row() -> None:
    linear = BlockLinear([weight_of(BLOCK_TYPES[8], 64, 64, torch.bfloat16)], [None])
    x = rows_of(3, 64, torch.bfloat16)
    expected = linear(x)
    x[1, 5] = torch.inf
    actual = linear(x)
    assert torch.equal(actual[[0, 2]], expected[[0, 2]])
    assert not bool(actual[1].isfinite().all())
