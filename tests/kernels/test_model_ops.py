"""Norms, activations, rotary and cache writes against transformers' own functions."""

import pytest
import torch
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from loraplex_kernels.layers.model_ops import (
    add_rms_norm,
    norm_heads,
    rms_norm,
    rope_and_cache,
    silu_mul,
    write_kv,
)
from loraplex_kernels.reference.model_ops import (
    add_rms_norm_reference,
    read_kv,
    rms_norm_reference,
    rope_and_cache_reference,
    silu_mul_reference,
    write_kv_reference,
)

pytestmark = pytest.mark.usefixtures("kernel_set")
DTYPES = [torch.float32, torch.bfloat16]
ROWS = [0, 1, 7, 17, 129]


def rows_of(n_rows: int, width: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * seed + n_rows)
    return torch.randn(n_rows, width, generator=generator).to(dtype)


def close(got: Tensor, expected: Tensor) -> None:
    wide = got.dtype in (torch.float32, torch.float64)
    torch.testing.assert_close(
        got, expected, atol=2e-6 if wide else 1e-6, rtol=2e-6 if wide else 1.2e-2
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows", ROWS)
@pytest.mark.parametrize("width", [16, 576, 2048])
def test_rms_norm_is_llamas(dtype: torch.dtype, n_rows: int, width: int) -> None:
    x, weight = rows_of(n_rows, width, dtype), rows_of(1, width, dtype)[0]
    module = LlamaRMSNorm(width, eps=1e-5).to(dtype)
    module.weight.data = weight
    close(rms_norm(x, weight, 1e-5), module(x).detach())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_with_an_offset_is_gemmas(dtype: torch.dtype) -> None:
    x, weight = rows_of(17, 576, dtype), rows_of(1, 576, dtype)[0]
    module = Gemma2RMSNorm(576, eps=1e-6).to(dtype)
    module.weight.data = weight
    close(rms_norm(x, weight, 1e-6, offset=1.0), module(x).detach())


@pytest.mark.parametrize("n_kv_heads", [1, 2])
def test_norms_of_heads_have_the_same_bits_alone_and_among_others(n_kv_heads: int) -> None:
    """Heads that lie apart in memory go the same way as heads side by side."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(64, (4 + 2 * n_kv_heads) * 16, generator=generator)
    weights = torch.randn(2, 16, generator=generator)
    sizes = {"n_heads": 4, "n_kv_heads": n_kv_heads}
    together = qkv.clone()
    norm_heads(together, weights[0], weights[1], 1e-6, **sizes)
    for row in range(64):
        alone = qkv[row : row + 1].clone()
        norm_heads(alone, weights[0], weights[1], 1e-6, **sizes)
        assert torch.equal(alone[0], together[row]), row


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("width", [576, 50])
def test_add_rms_norm_changes_the_residual_and_norms_the_sum(
    dtype: torch.dtype, width: int
) -> None:
    x, residual = rows_of(17, width, dtype), rows_of(17, width, dtype, seed=1)
    weight, expected_residual = rows_of(1, width, dtype)[0], residual.clone()
    expected = add_rms_norm_reference(x, expected_residual, weight, 1e-5)
    close(add_rms_norm(x, residual, weight, 1e-5), expected)
    assert torch.equal(residual, expected_residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_rows", ROWS)
@pytest.mark.parametrize(("act", "name"), [("silu", "silu"), ("gelu_tanh", "gelu_pytorch_tanh")])
def test_the_gated_activation_is_transformers(
    dtype: torch.dtype, n_rows: int, act: str, name: str
) -> None:
    gate_up = 4 * rows_of(n_rows, 2 * 528, dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    expected = (ACT2FN[name](gate.double()) * up.double()).to(dtype)
    close(silu_mul(gate_up, act=act), expected)


def test_extreme_gates_stay_finite_and_nan_stays_nan() -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30, float("nan")]).repeat(2)
    got = silu_mul(torch.cat((gate, torch.ones(16)))[None])
    torch.testing.assert_close(
        got[0], torch.nn.functional.silu(gate), equal_nan=True, atol=1e-30, rtol=1e-6
    )


def test_an_unknown_activation_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="known: silu, gelu_tanh"):
        silu_mul(torch.zeros(2, 32), act="relu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide_tables", [True, False])
@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "head_dim", "page_size"),
    [(9, 3, 64, 16), (4, 4, 32, 16), (8, 1, 80, 32), (2, 2, 8, 8)],
)
def test_rotary_turns_as_transformers_does_and_the_cache_holds_the_keys_and_values(
    dtype: torch.dtype,
    wide_tables: bool,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    page_size: int,
) -> None:
    n_rows = 37
    tables = torch.float32 if wide_tables else dtype
    angles = torch.rand(64, head_dim // 2).repeat(1, 2)
    cos, sin = angles.cos().to(tables), angles.sin().to(tables)
    positions = torch.randperm(64)[:n_rows]
    slots = torch.randperm(6 * page_size if page_size > 8 else 64)[:n_rows]
    k_cache = torch.full((8, n_kv_heads, page_size, head_dim), float("nan"), dtype=dtype)
    v_cache = k_cache.clone()
    q_k_v = rows_of(n_rows, (n_heads + 2 * n_kv_heads) * head_dim, dtype)
    heads = q_k_v.clone().view(n_rows, -1, head_dim)
    q, k, v = heads.split([n_heads, n_kv_heads, n_kv_heads], dim=1)
    q_rotated, k_rotated = apply_rotary_pos_emb(
        q.float(), k.float(), cos.float()[positions], sin.float()[positions]
    )
    rope_and_cache(q_k_v, cos, sin, positions, k_cache, v_cache, slots)
    close(
        q_k_v.view(n_rows, -1, head_dim)[:, : n_heads + n_kv_heads],
        torch.cat((q_rotated, k_rotated), dim=1).to(dtype),
    )
    keys, values = read_kv(k_cache, v_cache, slots)
    assert torch.equal(keys, q_k_v.view(n_rows, -1, head_dim)[:, n_heads : n_heads + n_kv_heads])
    assert torch.equal(values, v)
    untouched = 8 * page_size - n_rows
    assert int(v_cache.isnan().sum()) == untouched * n_kv_heads * head_dim


def test_a_partial_rotary_dimension_leaves_the_rest_of_a_head() -> None:
    cos, sin = torch.rand(9, 16), torch.rand(9, 16)
    caches = [torch.zeros(1, 2, 16, 32) for _ in range(4)]
    q_k_v = rows_of(5, 6 * 32, torch.float32)
    expected, positions = q_k_v.clone(), torch.arange(5)
    rope_and_cache(q_k_v, cos, sin, positions, *caches[:2], positions)
    rope_and_cache_reference(expected, cos, sin, positions, *caches[2:], positions)
    close(q_k_v, expected)
    assert torch.equal(caches[1], caches[3])


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_rotary_rows_with_a_negative_slot_are_not_written(dtype: torch.dtype) -> None:
    q_k_v = rows_of(3, 3 * 32, dtype)
    given = q_k_v.clone()
    k_cache, v_cache = (
        torch.zeros(2, 1, 16, 32, dtype=dtype),
        torch.zeros(2, 1, 16, 32, dtype=dtype),
    )
    slots = torch.tensor([17, -1, 3])
    rope_and_cache(q_k_v, None, None, slots, k_cache, v_cache, slots)
    assert torch.equal(q_k_v, given)
    keys, _ = read_kv(k_cache, v_cache, torch.tensor([17, 3]))
    assert torch.equal(keys[:, 0], given[[0, 2], 32:64])
    assert int((k_cache != 0).sum()) == 2 * 32


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_write_kv_takes_views_of_a_wider_tensor(dtype: torch.dtype) -> None:
    both = rows_of(21, 2 * 3 * 64, dtype).view(21, 6, 64)
    k_cache, v_cache = (torch.zeros(3, 3, 16, 64, dtype=dtype) for _ in range(2))
    slots = torch.randperm(48)[:21]
    write_kv(both[:, :3], both[:, 3:], k_cache, v_cache, slots)
    keys, values = read_kv(k_cache, v_cache, slots)
    assert torch.equal(keys, both[:, :3])
    assert torch.equal(values, both[:, 3:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "page_size"), [(64, 16), (80, 32), (8, 8)])
def test_an_int8_cache_holds_each_value_within_half_a_step_of_its_tokens_scale(
    dtype: torch.dtype, head_dim: int, page_size: int
) -> None:
    both = 10 ** torch.linspace(-12, 12, 21)[:, None, None] * rows_of(
        21, 6 * head_dim, torch.float32
    ).view(21, 6, head_dim)
    both[3, 0], both[4, 1, 2], both[5, 2, 0], both[6, 3, 1] = 0, torch.inf, torch.nan, -torch.inf
    both = both.to(dtype)
    shape = (4, 3, page_size, head_dim + 2)
    caches = [torch.full(shape, -1, dtype=torch.int8) for _ in range(4)]
    slots = torch.randperm(3 * page_size)[:21]
    write_kv(both[:, :3], both[:, 3:], caches[0], caches[1], slots)
    write_kv_reference(both[:, :3], both[:, 3:], caches[2], caches[3], slots)
    got, expected = read_kv(*caches[:2], slots), read_kv(*caches[2:], slots)
    for x, read, by_reference in zip((both[:, :3], both[:, 3:]), got, expected, strict=True):
        assert torch.equal(read.nan_to_num(7), by_reference.nan_to_num(7))
        is_finite = x.isfinite().all(-1)
        assert bool(read[~is_finite].isnan().all())
        x, read = x[is_finite].float(), read[is_finite]
        largest = x.abs().amax(-1, keepdim=True)
        assert bool(((x - read).abs() <= largest / 254 * (1 + 1 / 128) * (1 + 1e-6)).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_have_the_same_bits_alone_and_among_others(dtype: torch.dtype) -> None:
    x, weight = rows_of(300, 576, dtype), rows_of(1, 576, dtype)[0]
    normed, gated = rms_norm(x, weight, 1e-5), silu_mul(x)
    for row in (0, 99, 299):
        assert torch.equal(rms_norm(x[row : row + 1], weight, 1e-5)[0], normed[row])
        assert torch.equal(silu_mul(x[row : row + 1])[0], gated[row])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_run_the_reference(dtype: torch.dtype) -> None:
    x, weight = rows_of(5, 64, dtype), rows_of(1, 64, dtype)[0]
    assert torch.equal(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))
    assert torch.equal(silu_mul(x), silu_mul_reference(x))
