"""Packed linears against float64 products, and the bits of a row in any company."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from loraplex_kernels.cpu import native
from loraplex_kernels.formats.quantized_weight import WeightFormat, quantize_weight
from loraplex_kernels.formats.storage import WeightRange
from loraplex_kernels.layers import packed_linear
from loraplex_kernels.layers.base_linear import BaseLinear
from loraplex_kernels.layers.packed_linear import PackedLinear, packed_words
from loraplex_kernels.layers.quantized_linear import QuantizedLinear

DTYPES = [torch.float32, torch.bfloat16]


def weights_of(shapes: list[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator).mul(0.05).to(dtype) for shape in shapes]


def rows_of(n_rows: int, width: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(n_rows, width, generator=torch.Generator().manual_seed(n_rows)).to(dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.float16])
@pytest.mark.parametrize("n_rows", [0, 1, 7, 17, 129])
def test_a_stack_of_linears_equals_each_of_them(dtype: torch.dtype, n_rows: int) -> None:
    weights = weights_of([(576, 192), (64, 192), (72, 192)], dtype)
    bias = rows_of(1, 64, dtype)[0]
    linear = PackedLinear(weights, [None, bias, None])
    x = rows_of(n_rows, 192, dtype)
    got = linear(x)
    assert got.shape == (n_rows, 712)
    parts = [x.double() @ weight.double().T for weight in weights]
    parts[1] = parts[1] + bias.double()
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-12}.get(dtype, 1e-2)
    torch.testing.assert_close(
        got.double(), torch.cat(parts, dim=1), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(200, 576), (40, 20000), (1, 2), (33, 34)])
def test_a_row_has_the_same_bits_alone_and_among_others(
    dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    if not native.available():
        pytest.skip("native kernels are not built")
    linear = PackedLinear(weights_of([shape], dtype), [None])
    x = rows_of(515, shape[1], dtype)
    together = linear(x)
    for first, last in [(0, 1), (3, 4), (5, 21), (100, 165), (0, 514), (514, 515)]:
        assert torch.equal(linear(x[first:last]), together[first:last])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_has_the_same_bits_on_any_number_of_threads(dtype: torch.dtype) -> None:
    linear = PackedLinear(weights_of([(960, 576)], dtype), [None])
    x = rows_of(150, 576, dtype)
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = linear(x)
        torch.set_num_threads(3)
        shared = linear(x)
    finally:
        torch.set_num_threads(n_threads)
    if native.available():
        assert torch.equal(alone, shared)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", [None, WeightFormat.INT8, WeightFormat.INT4])
def test_the_product_of_one_linear_is_its_part_of_the_whole(
    dtype: torch.dtype, format: WeightFormat | None
) -> None:
    weights = weights_of([(48, 64), (20, 64), (33, 64)], dtype)
    biases = [None, rows_of(1, 20, dtype)[0], None]
    linear: BaseLinear = PackedLinear(weights, biases)
    if format is not None:
        linear = QuantizedLinear([quantize_weight(w, format) for w in weights], biases)
    x, whole = rows_of(7, 64, dtype), linear(rows_of(7, 64, dtype))
    for index, columns in enumerate((slice(0, 48), slice(48, 68), slice(68, 101))):
        around = torch.full((7, 60), torch.nan, dtype=dtype)
        out = around[:, : columns.stop - columns.start]
        linear.into_part(index, x, out)
        torch.testing.assert_close(out, whole[:, columns])
        assert int(around.isnan().sum()) == around.numel() - out.numel()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_gives_the_product(
    dtype: torch.dtype, each_kernel_set: Iterator[str]
) -> None:
    linear = PackedLinear(weights_of([(200, 160)], dtype), [rows_of(1, 200, dtype)[0]])
    x = rows_of(29, 160, dtype)
    expected = linear(x)
    for _ in each_kernel_set:
        torch.testing.assert_close(linear(x), expected, atol=1e-5, rtol=1e-2)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_packing_loses_nothing(dtype: torch.dtype) -> None:
    weights = weights_of([(70, 64), (33, 64)], dtype)
    linear = PackedLinear(weights, [None, None])
    assert all(torch.equal(linear.part(i), given) for i, given in enumerate(weights))
    ids = torch.tensor([0, 102, 31, 32, 70, 70])
    assert torch.equal(linear.embed(ids), torch.cat(weights)[ids])


def test_packed_weights_take_their_own_bytes_once() -> None:
    linear = PackedLinear(weights_of([(960, 576)], torch.bfloat16), [None], exponent_coding=False)
    assert linear.n_bytes == 960 * 576 * 2


def uneven_weights(n_out: int, in_features: int) -> Tensor:
    """Of every magnitude in some places: there the upper bytes are too many for a codebook."""
    weight = weights_of([(n_out, in_features)], torch.bfloat16)[0]
    generator = torch.Generator().manual_seed(n_out)
    for _ in range(max(1, in_features // 640)):
        row, column = (int(torch.randint(n, (1,), generator=generator)) for n in weight.shape)
        n = min(40, in_features - column)
        weight[row, column : column + n] = 2.0 ** -torch.arange(3, 3 + 3 * n, 3)
    return weight


@pytest.mark.usefixtures("kernel_set")
@pytest.mark.parametrize("in_features", [64, 576, 2048, 2112, 5120])
@pytest.mark.parametrize("n_out", [1, 70, 512])
def test_coded_weights_give_the_bits_of_plain_ones(in_features: int, n_out: int) -> None:
    weight = uneven_weights(n_out, in_features)
    bias = rows_of(1, n_out, torch.bfloat16)[0]
    coded = PackedLinear([weight], [bias])
    plain = PackedLinear([weight], [bias], exponent_coding=False)
    if native.prefers_coded_weights() and in_features > 64:
        assert coded.n_bytes < 0.9 * plain.n_bytes
    assert torch.equal(coded.part(0), weight)
    assert torch.equal(coded.embed(torch.arange(n_out).flip(0)), weight.flip(0))
    for n_rows in (1, 2, 3, 8, 12, 13, 16, 25, 200):
        x = rows_of(n_rows, in_features, torch.bfloat16)
        assert torch.equal(coded(x), plain(x))
        assert torch.equal(coded.argmax(x), plain.argmax(x))


def test_lesser_instruction_sets_read_coded_weights(each_kernel_set: Iterator[str]) -> None:
    if not native.prefers_coded_weights():
        pytest.skip("weights are coded for AVX512-BF16 alone")
    weight = uneven_weights(96, 2112)
    coded, plain = (
        PackedLinear([weight], [None]),
        PackedLinear([weight], [None], exponent_coding=False),
    )
    assert coded.n_bytes < plain.n_bytes
    for _ in each_kernel_set:
        for n_rows in (1, 16, 40):
            x = rows_of(n_rows, 2112, torch.bfloat16)
            assert torch.equal(coded(x), plain(x))


def test_weights_that_hardly_become_smaller_stay_plain() -> None:
    weight = 2.0 ** -torch.arange(64 * 128).remainder(60).float().reshape(128, 64)
    linear = PackedLinear([weight.bfloat16()], [None])
    assert linear.n_bytes == 128 * 64 * 2
    assert torch.equal(linear.part(0), weight.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_are_read_and_written_in_place(dtype: torch.dtype) -> None:
    linear = PackedLinear(weights_of([(48, 32)], dtype), [None])
    wide = rows_of(9, 80, dtype)
    out = torch.full((9, 100), 7.0, dtype=dtype)
    linear.into(wide[:, 16:48], out[:, 20:68])
    assert torch.equal(out[:, 20:68], linear(wide[:, 16:48].contiguous()))
    assert bool((out[:, :20] == 7).all())
    assert bool((out[:, 68:] == 7).all())


@pytest.mark.parametrize(
    "x", [torch.zeros(3, 31), torch.zeros(3, 32, dtype=torch.bfloat16), torch.zeros(32, 3).T]
)
def test_rows_of_another_shape_dtype_or_layout_are_refused(x: Tensor) -> None:
    if not native.available():
        pytest.skip("native kernels are not built")
    linear = PackedLinear(weights_of([(48, 32)], torch.float32), [None])
    with pytest.raises(ValueError, match=r"needs torch.float32 rows \[T, 32\]"):
        linear(x)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
def test_linears_in_one_range_are_what_they_are_alone(dtype: torch.dtype) -> None:
    stacks = [weights_of([(70, 64), (9, 64)], dtype), weights_of([(33, 128)], dtype)]
    sizes = [([w.shape[0] for w in stack], stack[0].shape[1]) for stack in stacks]
    memory = WeightRange(sum(packed_words(*size, dtype) for size in sizes))
    for stack in stacks:
        linear = PackedLinear(stack, [None] * len(stack), memory=memory)
        alone = PackedLinear(stack, [None] * len(stack))
        x = rows_of(5, linear.in_features, dtype)
        assert torch.equal(linear(x), alone(x))
        for i, weight in enumerate(stack):
            assert torch.equal(weight, linear.part(i))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent_coding", [False, True])
def test_what_is_packed_piece_by_piece_is_what_is_packed_at_once(
    dtype: torch.dtype, exponent_coding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = weights_of([(70, 64), (9, 64), (130, 64)], dtype)
    biases = [None] * len(weights)
    at_once = PackedLinear(weights, biases, exponent_coding=exponent_coding)
    monkeypatch.setattr(packed_linear, "_TEMPORARY_BYTES", 2 * 32 * 64 * dtype.itemsize)
    in_pieces = PackedLinear(weights, biases, exponent_coding=exponent_coding)
    assert in_pieces.n_bytes == at_once.n_bytes
    for i, weight in enumerate(weights):
        assert torch.equal(weight, in_pieces.part(i))
    x = rows_of(5, 64, dtype)
    assert torch.equal(in_pieces(x), at_once(x))


def test_a_range_gives_no_more_than_it_has() -> None:
    memory = WeightRange(WeightRange.words_of(17))
    assert memory.take(17).shape == (17,)
    with pytest.raises(ValueError, match="1 words do not fit: 0 are left"):
        memory.take(1)


@pytest.mark.usefixtures("kernel_set")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_out", [1, 33, 64, 5003])
@pytest.mark.parametrize("n_rows", [0, 1, 16, 600])
def test_the_largest_outputs_are_those_of_the_product(
    dtype: torch.dtype, n_out: int, n_rows: int
) -> None:
    """Among few different values, so that many are equal; numpy takes the first of them."""
    generator = torch.Generator().manual_seed(n_out)
    kinds = torch.randn(5, 64, generator=generator).to(dtype)
    weight = kinds[torch.randint(5, (n_out,), generator=generator)]
    linear = PackedLinear([weight], [torch.randint(2, (n_out,), generator=generator).to(dtype)])
    x = rows_of(n_rows, 64, dtype)
    wanted = linear(x).float().numpy().argmax(-1)
    n_threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert linear.argmax(x).tolist() == wanted.tolist()
    finally:
        torch.set_num_threads(n_threads)


@pytest.mark.usefixtures("kernel_set")
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_larger_than_nan_and_nothing_smaller_than_minus_infinity(
    dtype: torch.dtype,
) -> None:
    bias = torch.zeros(100, dtype=dtype)
    bias[:] = float("-inf")
    linear = PackedLinear([torch.ones(100, 2).to(dtype)], [bias])
    assert linear.argmax(torch.ones(1, 2).to(dtype)).tolist() == [0]
    bias[70] = 0.0
    bias[[41, 90]] = float("nan")
    some = PackedLinear([torch.ones(100, 2).to(dtype)], [bias])
    assert some.argmax(torch.ones(3, 2).to(dtype)).tolist() == [41] * 3
    bias[[41, 90]] = float("-inf")
    one = PackedLinear([torch.ones(100, 2).to(dtype)], [bias])
    assert one.argmax(torch.ones(1, 2).to(dtype)).tolist() == [70]


def test_without_native_code_the_largest_outputs_are_the_same() -> None:
    weight = torch.randn(200, 32).half()
    linear, x = PackedLinear([weight], [None]), rows_of(9, 32, torch.float16)
    assert linear.native is None
    assert linear.argmax(x).tolist() == (x @ weight.T).float().argmax(-1).tolist()
