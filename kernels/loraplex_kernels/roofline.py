"""The least time of every GPU kernel in a decode step: bytes over bandwidth, or flop over peak.

    least time = max(bytes / bandwidth, flop / peak)

Bytes are those that must cross the memory bus once: weights, caches and rows that no launch before
has just written are not told apart, so a kernel may be faster where the L2 cache still holds its
input. Bandwidths and peaks are those of the vendor's data sheets (SXM, dense bf16).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

__all__ = [
    "GPUS",
    "MODELS",
    "WEIGHT_BITS",
    "Bound",
    "DecodeStep",
    "Gpu",
    "ModelShape",
    "base_linear",
    "bounds",
    "deterministic_lines",
    "products_ms",
    "roofline_lines",
]

# Of a weight of the base with its share of the scales: int4 has one of 16 bits for each 128.
WEIGHT_BITS = {"bf16": 16.0, "int8": 8.0, "fp8": 8.0, "int4": 4.125}
_BYTES = 2  # of a bf16 or fp16 element
_SPLIT = 512  # positions of one partial of attention
_TILE = 64  # of ``matmul_kernel``


class Gpu(NamedTuple):
    name: str
    bandwidth: float  # bytes a second
    peak: float  # flop a second
    multiprocessors: int
    l2: float  # bytes a second out of the L2 cache; assumed, no data sheet says it


class ModelShape(NamedTuple):
    name: str
    hidden: int
    n_heads: int
    n_kv: int
    head_dim: int
    intermediate: int
    n_layers: int
    vocab: int

    @property
    def q_k_v(self) -> tuple[int, int, int]:
        kv = self.n_kv * self.head_dim
        return self.n_heads * self.head_dim, kv, kv

    @property
    def linears(self) -> tuple[tuple[int, int, int], ...]:
        """(in, Σ out, slices) of the packed linears of a layer."""
        return (
            (self.hidden, sum(self.q_k_v), 3),
            (self.q_k_v[0], self.hidden, 1),
            (self.hidden, 2 * self.intermediate, 2),
            (self.intermediate, self.hidden, 1),
        )


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One token of each of ``n_rows`` requests."""

    n_rows: int = 64
    context: int = 1024  # positions of each request
    n_adapters: int = 64  # that rows use, of one rank
    rank: int = 16
    experts_per_row: int = 2  # where rows are routed
    n_experts: int = 8  # of a routed adapter


class Bound(NamedTuple):
    kernel: str
    n_bytes: int  # of one launch
    flop: int
    n_launches: int  # in a step; 0 = not in a step of a fused base and plain adapters

    def least_us(self, gpu: Gpu) -> float:
        return max(self.n_bytes / gpu.bandwidth, self.flop / gpu.peak) * 1e6


GPUS = (
    Gpu("A100", 2.039e12, 312e12, 108, 4e12),
    Gpu("H100", 3.35e12, 989e12, 132, 5.5e12),
    Gpu("B200", 8.0e12, 2250e12, 148, 10e12),
)
MODELS = (
    ModelShape("Llama-3.1-8B", 4096, 32, 8, 128, 14336, 32, 128_256),
    ModelShape("Llama-3.1-70B", 8192, 64, 8, 128, 28672, 80, 128_256),
)


def bounds(model: ModelShape, step: DecodeStep) -> Iterator[Bound]:
    """Of every kernel; of LoRA's the mean over the four packed linears of a layer."""
    rows, layers = step.n_rows, model.n_layers
    q_width, kv_width, _ = model.q_k_v
    yield Bound("rms_norm_kernel", 4 * rows * model.hidden * _BYTES, 0, 2 * layers + 1)
    yield Bound("silu_mul_kernel", 3 * rows * model.intermediate * _BYTES, 0, layers)
    heads = rows * (q_width + kv_width)
    yield Bound("norm_heads_kernel", 2 * heads * _BYTES, 0, 0)
    rotated = 2 * (q_width + kv_width) + kv_width  # read and written, values read
    cached = 2 * kv_width
    yield Bound("rope_and_cache_kernel", rows * (rotated + cached) * _BYTES, 0, layers)
    yield Bound("write_kv_kernel", rows * 2 * cached * _BYTES, 0, 0)
    keys_values = rows * step.context * 2 * kv_width * _BYTES
    partials = -(-step.context // _SPLIT) * rows * model.n_heads * (model.head_dim + 2) * 4
    attend_flop = 4 * rows * step.context * q_width
    queries = rows * q_width * _BYTES
    yield Bound("attend_kernel", keys_values + queries + partials, attend_flop, layers)
    yield Bound("combine_kernel", partials + queries, 0, layers)
    yield from _lora(model, step)
    yield base_linear(model, step, "int8")._replace(n_launches=0)
    yield base_linear(model, step, "bf16")._replace(kernel="matmul_kernel", n_launches=0)
    pairs = rows * step.experts_per_row
    yield Bound("order_pairs_kernel", rows * 4 * 6, 0, 1)
    yield Bound("place_kernel", rows * 4 * 8, 0, 1)
    yield Bound("row_blocks_kernel", pairs * 4 * 6, 0, 0)
    yield from _experts(model, step)
    yield Bound("sample_kernel", rows * model.vocab * 4, 0, 1)


def _experts(model: ModelShape, step: DecodeStep) -> Iterator[Bound]:
    """Of one MLP block whose adapters route, and of linears whose inputs they scale."""
    rows, ff = step.n_rows, model.intermediate
    pairs = rows * step.experts_per_row
    gates = step.n_adapters * step.n_experts * model.hidden
    route_flop = 2 * rows * step.n_experts * model.hidden
    yield Bound("route_kernel", gates * 4 + rows * model.hidden * _BYTES, route_flop, 0)
    used = step.n_adapters * step.experts_per_row
    factors = used * step.rank * 2 * ff * _BYTES
    planes = pairs * step.rank * 2 * 4
    of_rows = (rows * 2 * ff + pairs * ff) * _BYTES
    yield Bound("expand_gate_kernel", factors + planes + of_rows, 2 * pairs * step.rank * 2 * ff, 0)
    yield Bound("mix_kernel", (pairs + rows) * ff * _BYTES, 0, 0)
    yield Bound("scale_inputs_kernel", (2 * rows + step.n_adapters) * ff * _BYTES, 0, 0)
    # of q, k and v, and of pairs whose experts have downs of their own
    of_each = rows + 3 * (rows + step.n_adapters)
    yield Bound("scale_inputs_of_each_kernel", of_each * model.hidden * _BYTES, 0, 0)
    yield Bound("sum_kernel", (pairs + rows) * model.hidden * _BYTES, 0, 0)


def base_linear(model: ModelShape, step: DecodeStep, format: str) -> Bound:
    """The mean over the four packed linears of a layer, weights in ``format`` of WEIGHT_BITS."""
    rows, n = step.n_rows, len(model.linears)
    weights = sum(k * out for k, out, _ in model.linears)
    activations = sum(rows * (k + out) for k, out, _ in model.linears) * _BYTES
    n_bytes = (int(weights * WEIGHT_BITS[format] / 8) + activations) // n
    n_launches = n * model.n_layers
    return Bound("quantized_linear_kernel", n_bytes, 2 * rows * weights // n, n_launches)


def _lora(model: ModelShape, step: DecodeStep) -> Iterator[Bound]:
    linears = model.linears
    n, n_launches = len(linears), len(linears) * model.n_layers
    rows, rank = step.n_rows, step.rank
    factors_a = sum(step.n_adapters * rank * k * s for k, _, s in linears) * _BYTES // n
    factors_b = sum(step.n_adapters * rank * out for _, out, _ in linears) * _BYTES // n
    x = sum(rows * k for k, _, _ in linears) * _BYTES // n
    out = sum(2 * rows * width for _, width, _ in linears) * _BYTES // n
    planes = sum(rows * rank * s for _, _, s in linears) * 4 // n
    flop_a = sum(2 * rows * rank * k * s for k, _, s in linears) // n
    flop_b = sum(2 * rows * rank * width for _, width, _ in linears) // n
    yield Bound("shrink_kernel", factors_a + x + planes, flop_a, n_launches)
    yield Bound("expand_kernel", factors_b + out + planes, flop_b, n_launches)
    k = step.experts_per_row
    yield Bound("expand_routed_kernel", k * factors_b + out + k * planes, k * flop_b, 0)
    yield Bound("fused_kernel", factors_a + factors_b + x + out, flop_a + flop_b, 0)


def products_ms(model: ModelShape, n_rows: int, gpu: Gpu, *, one_tile: bool) -> float:
    """Of all base products of a step, the head's left out; ``one_tile``: as ``matmul_kernel``.

    One tile: a multiprocessor draws at most twice its even share of the bandwidth, so few programs
    do not reach all of it; a program computes whole tiles; and every tile reads its operands out of
    the L2 cache.
    """
    total = 0.0
    for k, out, _ in model.linears:
        rows = -(-n_rows // _TILE) * _TILE if one_tile else n_rows
        n_bytes = (k * out + n_rows * (k + out)) * _BYTES
        programs = -(-out // _TILE) * (rows // _TILE) if one_tile else gpu.multiprocessors
        bandwidth = gpu.bandwidth * min(1.0, 2 * programs / gpu.multiprocessors)
        operands = _TILE + min(_TILE, n_rows)  # rows of W and of x that a program reads
        from_l2 = programs * operands * k * _BYTES / gpu.l2 if one_tile else 0.0
        total += max(n_bytes / bandwidth, 2 * rows * k * out / gpu.peak, from_l2)
    return total * model.n_layers * 1e3


def deterministic_lines() -> Iterator[str]:
    """The section of the report about ``--deterministic``."""
    rates = ", ".join(f"{gpu.name}: {gpu.l2 / 1e12:g} TB/s" for gpu in GPUS)
    yield "## What --deterministic costs"
    yield ""
    yield "By arithmetic, not measured: the base products of a step, against the roofline of a"
    yield f"product that is free in its tile. One tile of {_TILE} × {_TILE} is limited by the L2"
    yield f"cache in large steps (assumed: {rates}) and by few programs in small ones."
    yield ""
    yield (
        "| base | rows of the step | "
        + " | ".join(f"ms, {gpu.name} | with the flag | times" for gpu in GPUS)
        + " |"
    )
    yield "| --- " * (2 + 3 * len(GPUS)) + "|"
    for model in MODELS:
        for n_rows in (1, 64, 256, 2048):
            cells = [model.name, f"{n_rows:,}"]
            for gpu in GPUS:
                free = products_ms(model, n_rows, gpu, one_tile=False)
                tiled = products_ms(model, n_rows, gpu, one_tile=True)
                cells += [f"{free:.1f}", f"{tiled:.1f}", f"{tiled / free:.1f}"]
            yield "| " + " | ".join(cells) + " |"
    yield ""


def roofline_lines() -> Iterator[str]:
    """The section of the report."""
    step = DecodeStep()
    yield "## Least times"
    yield ""
    rates = ", ".join(
        f"{gpu.name}: {gpu.bandwidth / 1e12:.2f} TB/s, {gpu.peak / 1e12:.0f} TFLOP/s"
        for gpu in GPUS
    )
    yield "By arithmetic (`loraplex_kernels/roofline.py`), not measured: a decode step in bf16 of"
    yield f"{step.n_rows} rows over {step.context} positions each, {step.n_adapters} adapters of"
    yield f"rank {step.rank}; bytes over bandwidth or flop over peak, whichever is more ({rates})."
    yield "A launch itself takes 2 to 4 µs outside of a CUDA graph."
    for model in MODELS:
        yield ""
        yield f"### {model.name}"
        yield ""
        yield (
            "| kernel | MB a launch | GFLOP | launches a step | "
            + " | ".join(f"µs a launch, {gpu.name}" for gpu in GPUS)
            + " | "
            + " | ".join(f"µs a step, {gpu.name}" for gpu in GPUS)
            + " |"
        )
        yield "| --- " * (4 + 2 * len(GPUS)) + "|"
        for bound in bounds(model, step):
            each = [bound.least_us(gpu) for gpu in GPUS]
            cells = [
                bound.kernel,
                f"{bound.n_bytes / 1e6:.2f}",
                f"{bound.flop / 1e9:.2f}",
                str(bound.n_launches or "–"),
                *(f"{us:.1f}" for us in each),
                *(f"{us * bound.n_launches:.0f}" if bound.n_launches else "–" for us in each),
            ]
            yield "| " + " | ".join(cells) + " |"
    yield ""
    yield from _format_lines(step)


def _format_lines(step: DecodeStep) -> Iterator[str]:
    yield "### Linears of the base by format"
    yield ""
    yield f"All layers, head excepted, {step.n_rows} rows. bf16 is cuBLAS; the others are"
    yield "`quantized_linear_kernel` (the mean launch over int8 weights above)."
    yield ""
    yield "| model | weights | GB a step | " + " | ".join(f"ms, {g.name}" for g in GPUS) + " |"
    yield "| --- " * (3 + len(GPUS)) + "|"
    for model in MODELS:
        for format in WEIGHT_BITS:
            bound = base_linear(model, step, format)
            times = [f"{bound.least_us(gpu) * bound.n_launches / 1e3:.2f}" for gpu in GPUS]
            cells = [model.name, format, f"{bound.n_bytes * bound.n_launches / 1e9:.1f}", *times]
            yield "| " + " | ".join(cells) + " |"
    yield ""
