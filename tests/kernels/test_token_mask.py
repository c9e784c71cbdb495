"""Masks of allowed tokens: native code against numpy, alone and inside a head's product."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loraplex_kernels.cpu.token_mask import mask_bits, select_allowed, select_allowed_reference
from loraplex_kernels.layers.packed_linear import PackedLinear


def mask_of(n_tokens: int, density: float, seed: int) -> NDArray[np.int32]:
    words = -(-n_tokens // 32)
    bits = np.random.default_rng(seed).random((words, 32)) < density
    return np.packbits(bits, axis=1, bitorder="little").view(np.int32).reshape(words)


@settings(max_examples=60, deadline=None)
@given(
    n_tokens=st.integers(1, 200),
    density=st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]),
    seed=st.integers(0, 1000),
)
def test_the_allowed_logits_are_those_that_numpy_selects(
    n_tokens: int, density: float, seed: int
) -> None:
    logits = np.random.default_rng(seed + 1).normal(size=n_tokens).astype(np.float32)
    mask = mask_of(n_tokens, density, seed)
    values, ids = select_allowed(logits, mask)
    wanted_values, wanted_ids = select_allowed_reference(logits, mask)
    np.testing.assert_array_equal(values, wanted_values)
    np.testing.assert_array_equal(ids, wanted_ids)


def test_bit_i_of_word_w_is_token_32_w_plus_i() -> None:
    mask = np.array([1 << 3, -(1 << 31)], dtype=np.int32)
    assert np.flatnonzero(mask_bits(mask, 64)).tolist() == [3, 63]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_out", [33, 320, 1000])
def test_a_masked_argmax_is_the_largest_of_the_allowed_outputs(
    kernel_set: str, dtype: torch.dtype, n_out: int
) -> None:
    generator = torch.Generator().manual_seed(n_out)
    weight = torch.randn((n_out, 64), generator=generator).to(dtype)
    linear = PackedLinear([weight], [None])
    x = torch.randn((19, 64), generator=generator).to(dtype)
    densities = [1.0, 0.5, 0.05, 1.0]
    masks = np.stack([mask_of(n_out, densities[row % 4], row) for row in range(19)])
    masks[:, 0] |= 1  # never none
    outputs = np.where(mask_bits(masks, n_out), linear(x).float().numpy(), -np.inf)
    assert linear.argmax(x, masks).tolist() == outputs.argmax(-1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # float16: not in native code
def test_a_mask_without_a_bit_finds_no_output(dtype: torch.dtype) -> None:
    linear = PackedLinear([torch.ones((40, 16), dtype=dtype)], [None])
    masks = np.zeros((2, 2), dtype=np.int32)
    masks[1, 1] = 0b100
    assert linear.argmax(torch.ones((2, 16), dtype=dtype), masks).tolist() == [40, 34]
