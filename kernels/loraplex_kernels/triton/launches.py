"""Every launch that the tuning table can cause, recorded from the launchers, and some others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from loraplex_kernels.layout import PAGE_RANK, LoraTables, LoraTarget
from loraplex_kernels.moe_by_slot import InputScales
from loraplex_kernels.quantized_weight import QuantizedWeight, WeightFormat
from loraplex_kernels.routers import MAX_CHOICES, ROUTER_WORDS, RouterTable
from loraplex_kernels.sampling import empty_batch

from .aot import Launch, record_launches
from .arithmetic import reduction
from .attention import max_head_dim, paged_attention_triton
from .expand import lora_expand
from .fused import lora_fused
from .input_scales import scale_inputs_of_each_triton, scale_inputs_triton
from .kv_cache import rope_and_cache_triton, write_kv_triton
from .matmul import matmul_triton
from .moe import gate_pairs_triton, mix_pairs_triton, sum_pairs_triton
from .quantized_linear import quantized_linear_triton
from .rms_norm import norm_heads_triton, rms_norm_triton
from .router import route_by_slot_triton
from .routing import DeviceSegments, allocate_segments, fill_device_segments
from .sampling import sample_tokens_triton
from .shrink import lora_shrink, planes_shape
from .silu_mul import silu_mul_triton
from .tuning import ExpandChoice, FusedChoice, ShrinkChoice, TuningKey, TuningRow, TuningTable

__all__ = ["MODEL_TARGETS", "NamedLaunch", "all_launches"]

MODEL_TARGETS: dict[str, LoraTarget] = {
    "SmolLM2-135M qkv": LoraTarget("qkv", 576, (576, 192, 192)),
    "SmolLM2-135M o": LoraTarget("o", 576, (576,)),
    "SmolLM2-135M gate_up": LoraTarget("gate_up", 576, (1536, 1536)),
    "SmolLM2-135M down": LoraTarget("down", 1536, (576,)),
    "Llama-3.1-8B qkv": LoraTarget("qkv", 4096, (4096, 1024, 1024)),
    "Llama-3.1-8B o": LoraTarget("o", 4096, (4096,)),
    "Llama-3.1-8B gate_up": LoraTarget("gate_up", 4096, (14336, 14336)),
    "Llama-3.1-8B down": LoraTarget("down", 14336, (4096,)),
}

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


@dataclass(frozen=True, slots=True)
class NamedLaunch:
    name: str  # what it is for
    capability: int
    dtype: str
    launch: Launch
    batch_invariant: bool = True  # whether it sums as the kernel's other launches do


def all_launches(table: TuningTable, capabilities: tuple[int, ...]) -> list[NamedLaunch]:
    """Distinct launches of every row of ``table``, then of the kernels without a row."""
    found: dict[tuple[int, Launch], NamedLaunch] = {}

    def add(
        name: str,
        capability: int,
        dtype: str,
        call: Callable[[], object],
        *,
        batch_invariant: bool = True,
    ) -> None:
        with record_launches() as launches:
            call()
        for launch in launches:
            named = NamedLaunch(name, capability, dtype, launch, batch_invariant)
            found.setdefault((capability, launch), named)

    tuned = {row.key.capability for row in table.rows}
    for capability in capabilities:
        # whose rows it takes
        source = max((known for known in tuned if known <= capability), default=capability)
        for row in table.rows:
            if row.key.capability == source:
                for name, call in _calls_of(row, table):
                    add(name, capability, row.key.dtype, call)
    for capability in capabilities:
        for dtype in _DTYPES:
            for name, call in _other_calls(dtype):
                add(name, capability, dtype, call)
            for name, call in _wide_attention(dtype, capability):
                add(name, capability, dtype, call, batch_invariant=False)
    return list(found.values())


def _calls_of(row: TuningRow, table: TuningTable) -> Iterator[tuple[str, Callable[[], object]]]:
    key, choice = row.key, row.choice
    width = "out" if key.kernel == "expand" else "in"
    names = [
        name
        for name, target in MODEL_TARGETS.items()
        if name.endswith(("qkv", "down"))
        and (sum(target.out_features) if width == "out" else target.in_features) <= key.width
    ]
    # The two widest of the models stand for the row.
    names = sorted(names, key=lambda name: -MODEL_TARGETS[name].in_features)[:2]
    targets = {name: MODEL_TARGETS[name] for name in names} | {"41 → 401, 33": _AWKWARD}
    for name, target in targets.items():
        for k in (1, 2):
            if key.kernel == "fused" and k == 2:
                continue
            problem = _Problem.of(key, target, k)
            label = f"{name}, rank ≤ {key.rank}, {min(key.rows, 4096)} rows, {k} a row"
            if isinstance(choice, ShrinkChoice):
                yield label, partial(problem.shrink, choice)
            elif isinstance(choice, ExpandChoice):
                shrink_key = TuningKey(
                    "shrink", key.capability, key.dtype, key.rank, target.in_features, key.rows
                )
                serial = table.shrink(shrink_key).serial
                yield label, partial(problem.expand, choice, serial=serial)
            elif choice.enabled:
                yield label, partial(problem.fused, choice)


def _other_calls(dtype: str) -> Iterator[tuple[str, Callable[[], object]]]:
    kind = _DTYPES[dtype]
    if dtype == "fp32":
        yield "sampling, 64 rows of 128,256", partial(_sample, 64, 128_256)
    if dtype == "bf16":
        for k in (1, 2):
            for n_rows in (64, 4096):
                yield f"routing, {n_rows} rows, {k} a row", partial(_route, n_rows, k)
    yield "Llama-3.1-8B qkv, 64 rows", partial(_multiply, 64, 4096, 6144, kind)
    yield "41 → 401, 64 rows", partial(_multiply, 64, 41, 401, kind, has_bias=True)
    for hidden_size, intermediate_size, name in _WIDTHS:
        yield f"{name}, norm", partial(_norm, hidden_size, kind)
        yield f"{name}, gate", partial(_gate, intermediate_size, kind)
        yield f"{name}, routers", partial(_route_by_slot, hidden_size, kind)
        yield f"{name}, scales of inputs", partial(_scale_inputs, intermediate_size, kind)
        yield f"{name}, of each of three", partial(_scale_inputs_of_each, hidden_size, kind)
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
        for n_rows in (64, 2048):
            for window in (None, 4096):
                yield (
                    f"{name}, {n_rows} rows, window {window}",
                    partial(
                        _attend,
                        n_rows,
                        kind,
                        n_heads=n_heads,
                        n_kv=n_kv,
                        head_dim=head_dim,
                        window=window,
                    ),
                )


def _wide_attention(dtype: str, capability: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Large steps where rows need not have the same bits in every batch."""
    for n_heads, n_kv, head_dim, name in _ATTENTION:
        sizes = {"n_heads": n_heads, "n_kv": n_kv, "head_dim": head_dim}
        if dtype != "fp32" and head_dim <= 128:
            kind = _DTYPES[dtype]
            call = partial(_attend, 2048, kind, window=None, capability=capability, **sizes)
            yield f"{name}, 2048 rows, widest tile", call


@dataclass(frozen=True, slots=True)
class _Problem:
    x: Tensor
    out: Tensor
    storage: Tensor
    target: LoraTarget
    tables: LoraTables
    segments: DeviceSegments

    @classmethod
    def of(cls, key: TuningKey, target: LoraTarget, k: int) -> _Problem:
        """Uninitialised: nothing runs. Rows are few in memory, the tile is that of the row."""
        dtype, n_rows = _DTYPES[key.dtype], min(key.rows, 4096) // k
        max_pages = -(-min(key.rank, 256) // PAGE_RANK)
        shape = (8, target.n_slices)
        offsets = torch.empty(*shape, dtype=torch.int64)
        pages = torch.empty(*shape, max_pages, dtype=torch.int64)
        tables = LoraTables(torch.empty(shape, dtype=torch.int32), pages, pages, offsets, offsets)
        return cls(
            x=torch.empty(n_rows, target.in_features, dtype=dtype),
            out=torch.empty(n_rows, sum(target.out_features), dtype=dtype),
            storage=torch.empty(64, dtype=dtype),
            target=target,
            tables=tables,
            segments=allocate_segments(n_rows, k, _CPU, has_weights=k > 1, n_slots=8),
        )

    def shrink(self, choice: ShrinkChoice) -> None:
        inputs = (self.x, self.storage, self.target, self.tables, self.segments)
        lora_shrink(*inputs, choice, planes=self._planes(serial=choice.serial))

    def expand(self, choice: ExpandChoice, *, serial: bool) -> None:
        inputs = (self.x, self.storage, self.target, self.tables, self.segments)
        lora_expand(self._planes(serial=serial), *inputs, choice, out=self.out)

    def fused(self, choice: FusedChoice) -> None:
        inputs = (self.x, self.storage, self.target, self.tables, self.segments)
        lora_fused(*inputs, choice, out=self.out)

    def _planes(self, *, serial: bool) -> Tensor:
        cut = reduction(self.target.in_features, self.x.element_size())
        n_planes = 1 if serial else cut.n_chunks
        shape = planes_shape(self.target, self.tables, self.segments, n_planes=n_planes)
        return torch.empty(shape, dtype=torch.float32)


def _route(n_rows: int, k: int) -> None:
    segments = allocate_segments(n_rows, k, _CPU, has_weights=k > 1, n_slots=64)
    slots = torch.empty(n_rows, k, dtype=torch.int32)
    weights = torch.empty(n_rows, k) if k > 1 else None
    scratch = torch.empty(n_rows * k, 3, dtype=torch.int32)
    fill_device_segments(slots, weights, segments=segments, scratch=scratch)


def _norm(width: int, dtype: torch.dtype) -> None:
    """A first norm, one behind a residual, and Gemma's."""
    x, weight = torch.empty(64, width, dtype=dtype), torch.empty(width, dtype=dtype)
    rms_norm_triton(x, weight, 1e-5, out=x)
    rms_norm_triton(x, weight, 1e-5, out=x, residual=x)
    rms_norm_triton(x, weight, 1e-5, out=x, residual=x, offset=1.0)


def _norm_heads(n_heads: int, n_kv: int, head_dim: int, dtype: torch.dtype) -> None:
    """As Qwen3 has them."""
    qkv = torch.empty(64, (n_heads + 2 * n_kv) * head_dim, dtype=dtype)
    weight = torch.empty(head_dim, dtype=dtype)
    norm_heads_triton(qkv, weight, weight, 1e-6, n_heads=n_heads, n_kv_heads=n_kv)


def _route_by_slot(width: int, dtype: torch.dtype) -> None:
    """Of an MLP block and of the middle one of three projections."""
    x, n_slots = torch.empty(64, width, dtype=dtype), 64
    words = torch.empty(n_slots, 32, ROUTER_WORDS, dtype=torch.int64)[:, 0]
    top_p, load = torch.empty(n_slots, 32)[:, 0], torch.empty(n_slots, dtype=torch.int64)
    out = torch.empty(64, MAX_CHOICES, dtype=torch.int32), torch.empty(64, MAX_CHOICES)
    for of_projection in (False, True):
        route_by_slot_triton(
            x,
            torch.empty(64, dtype=torch.int32),
            torch.empty(64, dtype=dtype),
            RouterTable(words, top_p, load),
            slots=out[0],
            weights=out[1],
            slice_index=int(of_projection),
            n_slices=3 if of_projection else 1,
            takes_plain=not of_projection,
        )


def _scale_inputs(width: int, dtype: torch.dtype) -> None:
    x, storage = torch.empty(64, width, dtype=dtype), torch.empty(64, dtype=dtype)
    offsets = torch.empty(64, 32, dtype=torch.int64)[:, 0]
    scale_inputs_triton(x, torch.empty(64, dtype=torch.int32), storage, offsets)


def _scale_inputs_of_each(width: int, dtype: torch.dtype) -> None:
    """Of q, k and v."""
    x, storage = torch.empty(64, width, dtype=dtype), torch.empty(64, dtype=dtype)
    offsets = torch.empty(64, 32, dtype=torch.int64)[:, :3]
    row_slots, out = torch.empty(64, dtype=torch.int32), x.new_empty(3, 64, width)
    scale_inputs_of_each_triton(x, row_slots, storage, offsets, out=out)


def _experts(hidden_size: int, width: int, dtype: torch.dtype) -> None:
    """Without the launches of shrink and of routed expand, which have rows of the table."""
    target, n_rows, n_slots = LoraTarget("gate_up", hidden_size, (width, width)), 64, 64
    pages = torch.empty(n_slots, 2, 4, dtype=torch.int64)
    offsets = torch.empty(n_slots, 2, dtype=torch.int64)
    ranks = torch.empty(n_slots, 2, dtype=torch.int32)
    tables = LoraTables(ranks, pages, pages, offsets, offsets)
    segments = allocate_segments(n_rows, MAX_CHOICES, _CPU, has_weights=True, n_slots=n_slots)
    x, gate_up = (
        torch.empty(n_rows, hidden_size, dtype=dtype),
        torch.empty(n_rows, 2 * width, dtype=dtype),
    )
    storage = torch.empty(64, dtype=dtype)
    pair_act = gate_pairs_triton(x, gate_up, storage, target, tables, segments)
    row_slots = torch.empty(n_rows, dtype=torch.int32)
    for scales in (None, InputScales(row_slots, storage, offsets[:, 0])):
        mix_pairs_triton(gate_up, pair_act, segments, scales)
    sum_pairs_triton(torch.empty(n_rows * MAX_CHOICES, hidden_size, dtype=dtype), segments, out=x)


def _gate(width: int, dtype: torch.dtype) -> None:
    gate_up, out = torch.empty(64, 2 * width, dtype=dtype), torch.empty(64, width, dtype=dtype)
    for act in ("silu", "gelu_tanh"):
        silu_mul_triton(gate_up, out=out, act=act)


def _quantized(
    target: LoraTarget, format: WeightFormat, n_rows: int, dtype: torch.dtype, *, zeros: bool
) -> None:
    """With a bias, which takes registers."""
    k, n_out = target.in_features, sum(target.out_features)
    group_size = 128 if format is WeightFormat.INT4 else k
    codes = torch.empty(n_out, k // format.codes_a_byte, dtype=format.code_dtype)
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
) -> None:
    cache = torch.empty(8, n_kv, 16, head_dim, dtype=dtype)
    ints = torch.zeros(n_rows, dtype=torch.int64)
    n_requests = 32
    packed = torch.empty(n_rows, (n_heads + 2 * n_kv) * head_dim, dtype=dtype)
    heads = packed.view(n_rows, -1, head_dim)
    angle = torch.empty(4096, head_dim)
    sizes = {"n_heads": n_heads, "n_kv_heads": n_kv, "head_dim": head_dim}
    rope_and_cache_triton(packed, angle, angle, ints, cache, cache, ints, **sizes)
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
