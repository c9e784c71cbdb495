"""Times the engine's steps without HTTP: prefill of some prompts, then decode steps of all.

    .venv/bin/python loadtests/parts/bench_engine_step.py

With no adapter, one shared adapter and one of its own for each row (rank 16, all linears, random),
each in turn, several rounds; prints the median of the rounds' medians and the ratio to no adapter.
Before that, what it takes to place one of them: packing, the engine thread's part, the loader's
copy. With ``--weights both`` two bases, of coded and of plain weights, take turns.
"""

import argparse
import json
import random
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from loraplex_adapter_store.base_spec import BaseSpec
from loraplex_adapter_store.plan import AdapterPlan, Family, ModulePlan
from loraplex_kernels.formats.quantized_weight import WeightFormat
from loraplex_server.engine.adapters.device_pool import DevicePool, Residency
from loraplex_server.engine.memory.kv_cache import KvCache, KvGeometry
from loraplex_server.engine.memory.memory_plan import PoolLimits
from loraplex_server.engine.requests.client import GenerationRequest
from loraplex_server.engine.requests.request import Request
from loraplex_server.engine.requests.sampling_params import SamplingParams
from loraplex_server.engine.scheduling.scheduler import ScheduledChunk
from loraplex_server.engine.steps.model_runner import ModelRunner
from loraplex_server.model.base_model import load_base_model
from loraplex_server.model.loading.pull import DEFAULT_BASE, resolve_model

_CPU = torch.device("cpu")
_WEIGHTS = ("coded", "plain")


@dataclass(frozen=True)
class Lease:
    plan: AdapterPlan

    @property
    def digest(self) -> str:
        return self.plan.digest


@dataclass(frozen=True)
class Bench:
    """A base with its KV cache and its adapters, all resident."""

    runner: ModelRunner
    kv_cache: KvCache
    adapters: DevicePool
    leases: Sequence[Lease]
    weight_bytes: int  # of the base's linears, head included


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16, help="requests side by side")
    parser.add_argument("--context", type=int, default=110, help="tokens of each prompt")
    parser.add_argument("--kv-cache-dtype", choices=["auto", "int8"], default="auto")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--plain", action="store_true", help="factors in plain bfloat16, not exponent-coded pages"
    )
    parser.add_argument(
        "--weights",
        choices=[*_WEIGHTS, *WeightFormat, "both"],
        default="coded",
        help="the base's: exponent-coded, plain or quantised",
    )
    arguments = parser.parse_args()
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of the loader, as in the server: a second team slows every step
    kinds = _WEIGHTS if arguments.weights == "both" else (arguments.weights,)
    benches = {kind: _build(arguments, kind) for kind in kinds}
    torch.set_num_threads(n_threads)
    times: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(arguments.rounds):
        for case in ("no adapter", "one adapter", "distinct adapters"):
            for kind, bench in benches.items():
                rows = _leases_of(case, bench.leases, arguments.rows)
                took = _round(bench, rows, arguments.context, arguments.steps)
                times.setdefault((kind, case), []).append(took)
    for (kind, case), rounds in times.items():
        base = statistics.median(decode for _, decode in times[kind, "no adapter"])
        prefill = statistics.median(value for value, _ in rounds)
        decode = statistics.median(value for _, value in rounds)
        result = {
            "case": case,
            "weights": kind,
            "weights_mib": round(benches[kind].weight_bytes / 2**20),
            "rows": arguments.rows,
            "prefill_tokens_per_s": round(arguments.rows * arguments.context / prefill),
            "decode_step_ms": round(1000 * decode, 2),
            "decode_rate_of_no_adapter": round(base / decode, 3),
        }
        print(json.dumps(result))
    for bench in benches.values():
        bench.adapters.close()


def _build(arguments: argparse.Namespace, weights: str) -> Bench:
    n_rows = arguments.rows
    model = load_base_model(
        resolve_model(None),
        DEFAULT_BASE,
        dtype=torch.bfloat16,
        device=_CPU,
        exponent_coding=weights != "plain",
        quantization=WeightFormat(weights) if weights in list(WeightFormat) else None,
    )
    kv_cache = KvCache(
        KvGeometry(len(model.layers), model.n_kv_heads, model.head_dim),
        n_pages=n_rows * -(-(arguments.context + arguments.steps + 1) // 16),
        page_size=16,
        max_requests=n_rows,
        max_model_len=arguments.context + arguments.steps + 16,
        dtype=torch.int8 if arguments.kv_cache_dtype == "int8" else torch.bfloat16,
        device=_CPU,
        prefix_cache=False,
    )
    loaded = threading.Event()
    adapters = DevicePool(
        model,
        PoolLimits(n_rows * (32 << 20), n_slots=n_rows),
        on_loaded=loaded.set,
        exponent_coding=False if arguments.plain else None,
    )
    runner = ModelRunner(model, kv_cache, adapters)
    leases = [random_adapter(model.spec, seed) for seed in range(n_rows)]
    print(json.dumps(_cold_loads(adapters, leases, loaded)))
    for lease in leases:
        loaded.clear()
        adapters.ensure_resident(lease.plan)
        loaded.wait()
        assert adapters.ensure_resident(lease.plan) is Residency.RESIDENT
        adapters.hold(lease.digest)
    weight_bytes = sum(group.packed.n_bytes for group in model.groups.values())
    return Bench(runner, kv_cache, adapters, leases, weight_bytes)


def _leases_of(case: str, leases: Sequence[Lease], n_rows: int) -> Sequence[Lease | None]:
    if case == "no adapter":
        return [None] * n_rows
    return [leases[0]] * n_rows if case == "one adapter" else leases


def _cold_loads(
    adapters: DevicePool, leases: Sequence[Lease], loaded: threading.Event
) -> dict[str, object]:
    """Return the median milliseconds over the adapters; each leaves the device again."""
    packing, reserving, copying, publishing = [], [], [], []
    for lease in leases:
        marks = [time.perf_counter()]
        plan = adapters.packer.prepare(lease.plan)
        marks.append(time.perf_counter())
        loaded.clear()
        adapters.ensure_resident(plan)
        marks.append(time.perf_counter())
        loaded.wait()
        marks.append(time.perf_counter())
        assert adapters.ensure_resident(plan) is Residency.RESIDENT
        took = [after - before for before, after in pairwise([*marks, time.perf_counter()])]
        for column, seconds in zip((packing, reserving, copying, publishing), took, strict=True):
            column.append(seconds)
        adapters.drop(lease.digest)
    columns = {"pack": packing, "reserve": reserving, "copy": copying, "publish": publishing}
    return {
        "case": "cold load",
        **{f"{name}_ms": round(1000 * statistics.median(v), 2) for name, v in columns.items()},
    }


def random_adapter(spec: BaseSpec, seed: int, rank: int = 16) -> Lease:
    """Return a LoRA on all linears but the head."""
    generator = torch.Generator().manual_seed(seed)
    modules = {
        name: ModulePlan(
            a=0.02 * torch.randn(rank, shape.in_features, generator=generator),
            b=0.02 * torch.randn(shape.out_features, rank, generator=generator),
        )
        for name, shape in spec.modules.items()
        if name != spec.output_head
    }
    return Lease(AdapterPlan(digest=f"random-{seed}", family=Family.LORA, modules=modules))


def _round(
    bench: Bench, leases: Sequence[Lease | None], context: int, n_steps: int
) -> tuple[float, float]:
    """Return the seconds of the whole prefill and of the median decode step."""
    runner, kv_cache = bench.runner, bench.kv_cache
    requests = []
    for index, lease in enumerate(leases):
        ids = [random.randrange(1000) for _ in range(context)]
        source = GenerationRequest(
            f"r{index}", tuple(ids), SamplingParams(n_steps, temperature=0.0), lease
        )
        requests.append(Request(source, print, ids, context))
        kv_cache.admit(f"r{index}", bytes(16), ids)
    start = time.perf_counter()
    for first in range(0, len(requests), 4):
        runner.run([ScheduledChunk(request, 0, context) for request in requests[first : first + 4]])
    prefill = time.perf_counter() - start
    steps = []
    for _ in range(n_steps):
        for request in requests:
            request.token_ids.append(5)
            kv_cache.extend(request.id, request.n_tokens)
        start = time.perf_counter()
        runner.run([ScheduledChunk(request, request.n_tokens - 1, 1) for request in requests])
        steps.append(time.perf_counter() - start)
    for request in requests:
        kv_cache.release(request.id)
    return prefill, statistics.median(steps)


if __name__ == "__main__":
    main()
