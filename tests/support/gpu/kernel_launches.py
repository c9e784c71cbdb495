"""The launches of every kernel for the shapes of known models, recorded from the launchers."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch

from kernels.benchmarks.gpu_workload import MODEL_TARGETS
from loraplex_kernels.formats.gate_table import GATE_WORDS, MAX_CHOICES, GateTable
from loraplex_kernels.formats.layout import PAGE_RANK, LoraTables, LoraTarget
from loraplex_kernels.formats.quantized_weight import QuantizedWeight, WeightFormat
from loraplex_kernels.formats.sampling_batch import empty_batch
from loraplex_kernels.triton.attention import max_head_dim, paged_attention_triton
from loraplex_kernels.triton.factor_gradients import lora_factor_gradients
from loraplex_kernels.triton.group_rows import allocate_segments, fill_device_segments
from loraplex_kernels.triton.kv_cache import rope_and_cache_triton, write_kv_triton
from loraplex_kernels.triton.lora import lora_apply_triton
from loraplex_kernels.triton.matmul import matmul_triton
from loraplex_kernels.triton.moe import gate_pairs_triton, mix_pairs_triton
from loraplex_kernels.triton.moe_gate import route_by_slot_triton
from loraplex_kernels.triton.quantized_linear import quantized_linear_triton
from loraplex_kernels.triton.rms_norm import norm_heads_triton, rms_norm_triton
from loraplex_kernels.triton.sampling import sample_tokens_triton
from loraplex_kernels.triton.silu_mul import silu_mul_triton
from tests.support.gpu.compiled_kernels import CAPABILITIES, Launch, NamedLaunch, record_launches

__all__ = ["MODEL_TARGETS", "all_launches"]

_ATTENTION = (
    (9, 3, 64, "SmolLM2-135M"),
    (32, 8, 128, "Llama-3.1-8B"),
    (8, 4, 256, "gemma-2-2b"),
)

_WIDTHS = (
    (576, 1536, "SmolLM2-135M"),
    (4096, 14336, "Llama-3.1-8B"),
    (8192, 28672, "Llama-3.1-70B"),
)

_QUANTIZED = ("Llama-3.1-8B o", "Llama-3.1-8B gate_up")  # of small and of large tiles

_AWKWARD = LoraTarget("awkward", 41, (401, 33))
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_CPU = torch.device("cpu")


Calls = Iterator[tuple[str, Callable[[], object]]]


def all_launches(capabilities: tuple[int, ...] = CAPABILITIES) -> list[NamedLaunch]:
    """Return distinct launches, first of the LoRA operator, then of the other kernels."""
    named: dict[tuple[int, Launch], NamedLaunch] = {}
    for dtype in _DTYPES:
        for calls in (_lora_calls(dtype), _other_calls(dtype)):
            for name, call in calls:
                with record_launches() as launches:
                    call()
                for launch in launches:
                    for capability in capabilities:
                        one = NamedLaunch(name, capability, dtype, launch)
                        named.setdefault((capability, launch), one)
    for capability in capabilities:
        for dtype in ("bf16", "fp16"):
            for name, call in _wide_attention(dtype, capability):
                with record_launches() as launches:
                    call()
                for launch in launches:
                    one = NamedLaunch(name, capability, dtype, launch, batch_invariant=False)
                    named.setdefault((capability, launch), one)
    return list(named.values())


def _lora_calls(dtype: str) -> Calls:
    """Call the operator at each bound of the rule that chooses tiles."""
    for name, target in [*MODEL_TARGETS.items(), ("41 → 401, 33", _AWKWARD)]:
        if name.endswith((" o", " gate_up")):
            continue
        for rank in (16, 64, 256):
            for n_rows in (256, 1024, 4096):
                for k in (1, 2):
                    label = f"{name}, rank ≤ {rank}, {n_rows} pairs, {k} a row"
                    yield label, partial(_lora, target, rank, n_rows // k, k, _DTYPES[dtype])


def _lora(target: LoraTarget, rank: int, n_rows: int, k: int, dtype: torch.dtype) -> None:
    """Return a problem with uninitialised tensors, since nothing runs."""
    shape = (8, target.n_slices)
    offsets = torch.empty(*shape, dtype=torch.int64)
    pages = torch.empty(*shape, rank // PAGE_RANK, dtype=torch.int64)
    ranks, storage = torch.empty(shape, dtype=torch.int32), torch.empty(64, dtype=dtype)
    tables = LoraTables(target, storage, ranks, pages, pages, offsets, offsets)
    lora_apply_triton(
        torch.empty(n_rows, target.in_features, dtype=dtype),
        tables,
        allocate_segments(n_rows, k, _CPU, has_weights=k > 1, n_slots=8),
        out=torch.empty(n_rows, sum(target.out_features), dtype=dtype),
    )


def _other_calls(dtype: str) -> Calls:
    kind = _DTYPES[dtype]
    if dtype == "fp32":
        yield "sampling, 64 rows of 128,256", partial(_sample, 64, 128_256)
    if dtype == "bf16":
        for k in (1, 2):
            for n_rows in (64, 4096):
                yield f"grouping, {n_rows} rows, {k} a row", partial(_group_rows, n_rows, k)
    yield "Llama-3.1-8B qkv, 64 rows", partial(_multiply, 64, 4096, 6144, kind)
    yield "41 → 401, 64 rows", partial(_multiply, 64, 41, 401, kind, has_bias=True)
    for width in (401, 4096, 14336):
        yield f"gradients of factors, width {width}", partial(_factor_gradients, width, kind)
    for hidden_size, intermediate_size, name in _WIDTHS:
        yield f"{name}, norm", partial(_norm, hidden_size, kind)
        yield f"{name}, gate", partial(_gate, intermediate_size, kind)
        yield f"{name}, gates", partial(_route_by_slot, hidden_size, kind)
        yield f"{name}, experts of 64 rows", partial(_experts, hidden_size, intermediate_size, kind)
    for format, zeros in (*((format, False) for format in WeightFormat), (WeightFormat.INT4, True)):
        for name in _QUANTIZED if dtype == "bf16" else _QUANTIZED[:1]:
            for n_rows in (16, 32, 2048):
                call = partial(_quantized, MODEL_TARGETS[name], format, n_rows, kind, zeros=zeros)
                yield f"{name} in {format}{' with zeros' if zeros else ''}, {n_rows} rows", call
    for n_heads, n_kv, head_dim, name in _ATTENTION:
        yield f"{name}, norms of heads", partial(_norm_heads, n_heads, n_kv, head_dim, kind)
        if head_dim > max_head_dim(kind):
            continue
        cache_dtypes = (None, torch.float8_e4m3fn) if dtype == "bf16" else (None,)
        for n_rows, window, cache in product((64, 2048), (None, 4096), cache_dtypes):
            yield (
                f"{name}, {n_rows} rows, window {window}{', fp8 cache' if cache else ''}",
                partial(
                    _attend,
                    n_rows,
                    kind,
                    n_heads=n_heads,
                    n_kv=n_kv,
                    head_dim=head_dim,
                    window=window,
                    cache_dtype=cache,
                ),
            )


def _wide_attention(dtype: str, capability: int) -> Calls:
    """Run large steps without the promise of equal bits in every batch."""
    for n_heads, n_kv, head_dim, name in _ATTENTION:
        sizes = {"n_heads": n_heads, "n_kv": n_kv, "head_dim": head_dim}
        if dtype != "fp32" and head_dim <= 128:
            kind = _DTYPES[dtype]
            call = partial(_attend, 2048, kind, window=None, capability=capability, **sizes)
            yield f"{name}, 2048 rows, widest tile", call


def _factor_gradients(width: int, dtype: torch.dtype) -> None:
    pages = torch.empty(8, 4, dtype=torch.int64)
    ranks, out = torch.empty(8, dtype=torch.int32), torch.empty(64)
    segments = replace(
        allocate_segments(1024, 1, _CPU, has_weights=False, n_slots=8),
        indptr=torch.empty(9, dtype=torch.int32),
    )
    planes, z = torch.empty(4, 1024, PAGE_RANK), torch.empty(1024, width, dtype=dtype)
    lora_factor_gradients(planes, z, ranks, pages, segments, out=out)


def _group_rows(n_rows: int, k: int) -> None:
    segments = allocate_segments(n_rows, k, _CPU, has_weights=k > 1, n_slots=64)
    slots = torch.empty(n_rows, k, dtype=torch.int32)
    weights = torch.empty(n_rows, k) if k > 1 else None
    scratch = torch.empty(n_rows * k, 3, dtype=torch.int32)
    fill_device_segments(slots, weights, segments=segments, scratch=scratch)


def _norm(width: int, dtype: torch.dtype) -> None:
    """Run a first norm, a norm behind a residual, and Gemma's norm."""
    x, weight = torch.empty(64, width, dtype=dtype), torch.empty(width, dtype=dtype)
    rms_norm_triton(x, weight, 1e-5, out=x)
    rms_norm_triton(x, weight, 1e-5, out=x, residual=x)
    rms_norm_triton(x, weight, 1e-5, out=x, residual=x, offset=1.0)


def _norm_heads(n_heads: int, n_kv: int, head_dim: int, dtype: torch.dtype) -> None:
    """Run the norms of heads that Qwen3 has."""
    qkv = torch.empty(64, (n_heads + 2 * n_kv) * head_dim, dtype=dtype)
    weight = torch.empty(head_dim, dtype=dtype)
    norm_heads_triton(qkv, weight, weight, 1e-6, n_heads=n_heads, n_kv_heads=n_kv)


def _route_by_slot(width: int, dtype: torch.dtype) -> None:
    n_slots = 64
    words = torch.empty(n_slots, 32, GATE_WORDS, dtype=torch.int64)[:, 0]
    route_by_slot_triton(
        torch.empty(64, width, dtype=dtype),
        torch.empty(64, dtype=torch.int32),
        torch.empty(64, dtype=dtype),
        GateTable(words, torch.empty(n_slots, dtype=torch.int64)),
        slots=torch.empty(64, MAX_CHOICES, dtype=torch.int32),
        weights=torch.empty(64, MAX_CHOICES),
    )


def _experts(hidden_size: int, width: int, dtype: torch.dtype) -> None:
    """Run the expert kernels except the expand over rows, which ``_lora`` launches."""
    target, n_rows, n_slots = LoraTarget("gate_up", hidden_size, (width, width)), 64, 64
    pages = torch.empty(n_slots, 2, 4, dtype=torch.int64)
    offsets = torch.empty(n_slots, 2, dtype=torch.int64)
    ranks = torch.empty(n_slots, 2, dtype=torch.int32)
    storage = torch.empty(64, dtype=dtype)
    tables = LoraTables(target, storage, ranks, pages, pages, offsets, offsets)
    segments = allocate_segments(n_rows, MAX_CHOICES, _CPU, has_weights=True, n_slots=n_slots)
    x = torch.empty(n_rows, hidden_size, dtype=dtype)
    gate_up = torch.empty(n_rows, 2 * width, dtype=dtype)
    pair_act = gate_pairs_triton(x, gate_up, tables, segments)
    mix_pairs_triton(gate_up, pair_act, segments)


def _gate(width: int, dtype: torch.dtype) -> None:
    gate_up, out = torch.empty(64, 2 * width, dtype=dtype), torch.empty(64, width, dtype=dtype)
    for act in ("silu", "gelu_tanh"):
        silu_mul_triton(gate_up, out=out, act=act)


def _quantized(
    target: LoraTarget, format: WeightFormat, n_rows: int, dtype: torch.dtype, *, zeros: bool
) -> None:
    """Run the products with a bias, which takes registers."""
    k, n_out = target.in_features, sum(target.out_features)
    group_size = 128 if format is WeightFormat.INT4 else k
    width = k // 2 if format is WeightFormat.INT4 else k
    codes = torch.empty(n_out, width, dtype=format.code_dtype)
    scale_dtype = dtype if format is WeightFormat.INT4 else torch.float32
    scales = torch.empty(n_out, k // group_size, dtype=scale_dtype)
    of_groups = torch.empty_like(scales, dtype=torch.uint8) if zeros else None
    weight = QuantizedWeight(format, codes, scales, k, group_size, dtype, of_groups)
    x, out = torch.empty(n_rows, k, dtype=dtype), torch.empty(n_rows, n_out, dtype=dtype)
    quantized_linear_triton(x, weight, torch.empty(n_out, dtype=dtype), out=out)


def _multiply(
    n_rows: int, in_features: int, n_out: int, dtype: torch.dtype, *, has_bias: bool = False
) -> None:
    x = torch.empty(1, n_rows, in_features, dtype=dtype)
    weight = torch.empty(1, n_out, in_features, dtype=dtype).transpose(1, 2)
    bias = torch.empty(n_out, dtype=dtype) if has_bias else None
    matmul_triton(x, weight, bias, out=x.new_empty(1, n_rows, n_out))


def _sample(n_rows: int, vocab_size: int) -> None:
    logits = torch.empty(n_rows, vocab_size)
    sample_tokens_triton(logits, empty_batch(n_rows, vocab_size, _CPU))


def _attend(
    n_rows: int,
    dtype: torch.dtype,
    *,
    n_heads: int,
    n_kv: int,
    head_dim: int,
    window: int | None,
    capability: int | None = None,  # with it: the widest tiles that it has
    cache_dtype: torch.dtype | None = None,  # None: dtype
) -> None:
    cache = torch.empty(8, n_kv, 16, head_dim, dtype=cache_dtype or dtype)
    ints = torch.zeros(n_rows, dtype=torch.int64)
    n_requests = 32
    packed = torch.empty(n_rows, (n_heads + 2 * n_kv) * head_dim, dtype=dtype)
    heads = packed.view(n_rows, -1, head_dim)
    angle = torch.empty(4096, head_dim)
    rope_and_cache_triton(packed, angle, angle, ints, cache, cache, ints)
    write_kv_triton(heads[:, :n_kv], heads[:, :n_kv], cache, cache, ints)
    paged_attention_triton(
        heads[:, :n_heads],
        cache,
        cache,
        torch.empty(n_requests, 512, dtype=torch.int32),
        torch.empty(n_requests + 1, dtype=torch.int32),
        torch.empty(n_requests, dtype=torch.int32),
        scale=0.125,
        window=window,
        softcap=None if window is None else 30.0,
        batch_invariant=capability is None,
        capability=capability,
    )
