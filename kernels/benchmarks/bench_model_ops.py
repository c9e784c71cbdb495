"""A step of the default base's shape (random weights) in native operators and in PyTorch + oneDNN.

    python -m kernels.benchmarks.bench_model_ops [--out kernels/benchmarks/model_ops.json]

Both run the same step in turn: all layers' linears, norms, rotary, cache writes, attention and the
head, without adapters. The opponent is the fastest way PyTorch offers: weights reordered once for
oneDNN, ``rms_norm``, decode attention as two batched products over a slot cache, SDPA for prefill.
Times are the best of the repeats, so that what else the machine does counts least.
"""

import argparse
import json
import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from kernels.benchmarks import kernel_sets
from loraplex_kernels.layers.model_ops import (
    add_rms_norm,
    paged_attention,
    rms_norm,
    rope_and_cache,
    silu_mul,
)
from loraplex_kernels.layers.packed_linear import PackedLinear

N_LAYERS, WIDTH, N_HEADS, N_KV_HEADS, HEAD_DIM, FF, N_TOKENS = 30, 576, 9, 3, 64, 1536, 49152
PAGE = 16
DTYPE = torch.bfloat16

Call = Callable[..., Any]  # (name, function, *arguments, **options): runs it, perhaps with a clock


@dataclass(frozen=True)
class Shape:
    name: str
    n_requests: int
    n_queries: int  # of each request
    context: int

    @property
    def n_rows(self) -> int:
        return self.n_requests * self.n_queries


SHAPES = (
    Shape("decode, 1 request, 110 tokens", 1, 1, 110),
    Shape("decode, 16 requests, 110 tokens", 16, 1, 110),
    Shape("decode, 32 requests, 110 tokens", 32, 1, 110),
    Shape("decode, 16 requests, 2000 tokens", 16, 1, 2000),
    Shape("prefill, 512 tokens", 1, 512, 512),
    Shape("prefill, 1024 tokens", 1, 1024, 1024),
)


class Native:
    def __init__(self, weights: list[list[Tensor]], head: Tensor, shape: Shape) -> None:
        q = N_HEADS * HEAD_DIM
        self.layers = [
            (
                PackedLinear(qkv.split([q, q // 3, q // 3]), [None] * 3),
                PackedLinear([o], [None]),
                PackedLinear(gate_up.chunk(2), [None] * 2),
                PackedLinear([down], [None]),
            )
            for qkv, o, gate_up, down in weights
        ]
        self.head = PackedLinear([head], [None])
        self.shape = shape
        n_pages = -(-shape.context // PAGE)
        self.table = torch.randperm(shape.n_requests * n_pages).int().view(-1, n_pages)
        size = (shape.n_requests * n_pages, N_KV_HEADS, PAGE, HEAD_DIM)
        self.caches = [(torch.randn(size).to(DTYPE), torch.randn(size).to(DTYPE)) for _ in weights]
        self.starts = torch.arange(shape.n_requests + 1).int() * shape.n_queries
        self.lens = torch.full((shape.n_requests,), shape.context, dtype=torch.int32)
        places = torch.arange(shape.context - shape.n_queries, shape.context)
        self.positions = places.repeat(shape.n_requests)
        self.slots = (self.table.long()[:, places // PAGE] * PAGE + places % PAGE).flatten()
        angles = torch.rand(shape.context, HEAD_DIM)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.norm = torch.ones(WIDTH, dtype=DTYPE)

    def step(self, x: Tensor, call: Call) -> Tensor:
        residual = x.clone()
        x = call("norms", rms_norm, residual, self.norm, 1e-5)
        for (qkv, o, gate_up, down), (keys, values) in zip(self.layers, self.caches, strict=True):
            heads = call("linears", qkv, x)
            call(
                "rotary and cache",
                rope_and_cache,
                heads,
                self.cos,
                self.sin,
                self.positions,
                keys,
                values,
                self.slots,
                n_heads=N_HEADS,
                n_kv_heads=N_KV_HEADS,
                head_dim=HEAD_DIM,
            )
            mixed = call(
                "attention",
                paged_attention,
                heads.view(len(x), -1, HEAD_DIM)[:, :N_HEADS],
                keys,
                values,
                self.table,
                self.starts,
                self.lens,
                scale=HEAD_DIM**-0.5,
            )
            x = call("linears", o, mixed.view(len(x), -1))
            x = call("norms", add_rms_norm, x, residual, self.norm, 1e-5)
            x = call("activation", silu_mul, call("linears", gate_up, x))
            x = call("linears", down, x)
            x = call("norms", add_rms_norm, x, residual, self.norm, 1e-5)
        last = x[self.shape.n_queries - 1 :: self.shape.n_queries]
        return call("head", self.head, last)


class OneDnn:
    def __init__(self, weights: list[list[Tensor]], head: Tensor, shape: Shape) -> None:
        reorder = torch.ops.mkldnn._reorder_linear_weight
        self.layers = [[reorder(weight, shape.n_rows) for weight in layer] for layer in weights]
        self.head = reorder(head, shape.n_requests)
        self.shape = shape
        size = (shape.n_requests, N_KV_HEADS, shape.context, HEAD_DIM)
        self.caches = [(torch.randn(size).to(DTYPE), torch.randn(size).to(DTYPE)) for _ in weights]
        angles = torch.rand(shape.n_rows, 1, HEAD_DIM)
        self.cos, self.sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
        self.norm = torch.ones(WIDTH, dtype=DTYPE)

    def step(self, x: Tensor, call: Call) -> Tensor:
        x = x.clone()
        for (qkv, o, gate_up, down), cache in zip(self.layers, self.caches, strict=True):
            normed = call("norms", functional.rms_norm, x, [WIDTH], self.norm, 1e-5)
            heads = call("linears", _linear, normed, qkv).view(len(x), -1, HEAD_DIM)
            q, k, v = heads.split([N_HEADS, N_KV_HEADS, N_KV_HEADS], dim=1)
            q, k = call("rotary and cache", self._rotate, q, k)
            call("rotary and cache", self._store, k, v, *cache)
            mixed = call("attention", self._attend, q, *cache)
            x = x + call("linears", _linear, mixed, o)
            normed = call("norms", functional.rms_norm, x, [WIDTH], self.norm, 1e-5)
            wide = call("linears", _linear, normed, gate_up)
            x = x + call("linears", _linear, call("activation", _silu_mul, wide), down)
        x = call("norms", functional.rms_norm, x, [WIDTH], self.norm, 1e-5)
        return call("head", _linear, x[self.shape.n_queries - 1 :: self.shape.n_queries], self.head)

    def _rotate(self, *heads: Tensor) -> list[Tensor]:
        return [
            x * self.cos + torch.cat((-x[..., 32:], x[..., :32]), dim=-1) * self.sin for x in heads
        ]

    def _store(self, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> None:
        n, s = self.shape.n_requests, self.shape.n_queries
        keys[:, :, -s:] = k.view(n, s, N_KV_HEADS, HEAD_DIM).transpose(1, 2)
        values[:, :, -s:] = v.reshape(n, s, N_KV_HEADS, HEAD_DIM).transpose(1, 2)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        n, s = self.shape.n_requests, self.shape.n_queries
        if s == 1:
            grouped = q.view(n, N_KV_HEADS, N_HEADS // N_KV_HEADS, HEAD_DIM)
            scores = torch.matmul(grouped, keys.transpose(2, 3)) * HEAD_DIM**-0.5
            return torch.matmul(scores.softmax(-1), values).view(n, -1)
        q = q.view(n, s, N_HEADS, HEAD_DIM).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(
            q, keys, values, is_causal=True, enable_gqa=True
        )
        return mixed.transpose(1, 2).reshape(n * s, -1)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


def _silu_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def _plain(_: str, function: Call, *arguments: Any, **options: Any) -> Any:
    return function(*arguments, **options)


def _clocked(step: Callable[[Tensor, Call], Tensor], x: Tensor) -> dict[str, float]:
    spent: dict[str, float] = defaultdict(float)

    def call(name: str, function: Call, *arguments: Any, **options: Any) -> Any:
        start = time.perf_counter()
        result = function(*arguments, **options)
        spent[name] += (time.perf_counter() - start) * 1e3
        return result

    step(x, call)
    return spent


def measure(shape: Shape, seconds: float) -> dict[str, Any]:
    weights = [
        [
            torch.randn(size).mul(0.05).to(DTYPE)
            for size in ((960, WIDTH), (WIDTH, WIDTH), (2 * FF, WIDTH), (WIDTH, FF))
        ]
        for _ in range(N_LAYERS)
    ]
    head = torch.randn(N_TOKENS, WIDTH).mul(0.05).to(DTYPE)
    contenders = {
        "native": Native(weights, head, shape),
        "onednn": OneDnn(weights, head, shape),
    }
    x = torch.randn(shape.n_rows, WIDTH).to(DTYPE)
    best: dict[str, float] = {}
    parts: dict[str, dict[str, float]] = {name: {} for name in contenders}
    end = time.monotonic() + seconds
    repeats = 0
    while repeats < 3 or time.monotonic() < end:
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender.step(x, _plain)
            spent = (time.perf_counter() - start) * 1e3
            best[name] = min(best.get(name, spent), spent)
            for part, ms in _clocked(contender.step, x).items():
                parts[name][part] = min(parts[name].get(part, ms), ms)
        repeats += 1
    return {
        "shape": shape.name,
        "rows": shape.n_rows,
        "repeats": repeats,
        "native_ms": round(best["native"], 2),
        "onednn_ms": round(best["onednn"], 2),
        "speedup": round(best["onednn"] / best["native"], 2),
        "parts_ms": {
            name: {part: round(ms, 2) for part, ms in spent.items()}
            for name, spent in parts.items()
        },
    }


def call_overhead() -> dict[str, float]:
    """Microseconds of one call on a single row: what Python and the call itself cost."""
    x, weight = torch.randn(1, 64).to(DTYPE), torch.ones(64, dtype=DTYPE)
    gate_up, out = torch.randn(1, 64).to(DTYPE), torch.empty(1, 32, dtype=DTYPE)
    linear = PackedLinear([torch.randn(32, 64).to(DTYPE)], [None])
    cache = torch.zeros(1, 1, 16, 64, dtype=DTYPE)
    heads, slot = torch.randn(1, 3 * 64).to(DTYPE), torch.zeros(1, dtype=torch.int64)
    q, table = torch.randn(1, 1, 64).to(DTYPE), torch.zeros(1, 1, dtype=torch.int32)
    starts, lens = torch.tensor([0, 1]).int(), torch.tensor([1]).int()
    ends = torch.empty_like(q)
    calls: dict[str, Callable[[], object]] = {
        "add_rms_norm": lambda: add_rms_norm(x, x, weight, 1e-5),
        "silu_mul": lambda: silu_mul(gate_up),
        "PackedLinear.into": lambda: linear.into(x, out),
        "rope_and_cache": lambda: rope_and_cache(heads, None, None, slot, cache, cache, slot),
        "paged_attention": lambda: paged_attention(
            q, cache, cache, table, starts, lens, scale=1.0, out=ends
        ),
    }
    overhead = {}
    for name, call in calls.items():
        times = []
        for _ in range(30):
            start = time.perf_counter()
            for _ in range(200):
                call()
            times.append((time.perf_counter() - start) / 200)
        overhead[name] = round(min(times) * 1e6, 2)
    return overhead


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("model_ops.json"))
    parser.add_argument("--seconds", type=float, default=6.0, help="of each shape, at least")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    kernel_set = kernel_sets.kernel_set()
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "n_cpus": os.cpu_count(),
        "n_threads": torch.get_num_threads(),
        "kernel_set": kernel_set or "none",
        "torch": torch.__version__,
        "call_overhead_us": call_overhead(),
        "steps": [],
    }
    with torch.inference_mode():
        for shape in SHAPES:
            row = measure(shape, arguments.seconds)
            result["steps"].append(row)
            print(
                f"{row['shape']:34} native {row['native_ms']:8.2f} ms  "
                f"oneDNN {row['onednn_ms']:8.2f} ms  × {row['speedup']}"
            )
    print("microseconds a call:", result["call_overhead_us"])
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
