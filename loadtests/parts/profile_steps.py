"""Profiles decode steps of a running engine: which kernels a step's time goes to.

    python -m loadtests.parts.profile_steps MODEL OUT.json

Half of the rows have an adapter of their own, of ranks 8, 16 and 64 in turns, and half of all draw
with top_p. Without a CUDA device the steps run and no kernel is found; ``make gpu-report`` does
both.
"""

import asyncio
import json
import sys
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from loadtests.parts.bench_engine_step import Lease, random_adapter
from loraplex_server.engine.build import build_engine
from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.requests.client import GenerationRequest
from loraplex_server.engine.requests.events import TokenEvent
from loraplex_server.engine.requests.sampling_params import SamplingParams

_N_ADAPTERS, _N_TOKENS, _N_KERNELS = 32, 21, 25  # 20 steps decode
_RANKS = (8, 16, 64)


async def _generate(engine: Engine, run: str, leases: Sequence[Lease]) -> None:
    queue: asyncio.Queue[TokenEvent] = asyncio.Queue()
    greedy = SamplingParams(max_tokens=_N_TOKENS, temperature=0.0, ignore_eos=True)
    drawn = SamplingParams(_N_TOKENS, temperature=0.8, top_p=0.9, seed=1, ignore_eos=True)
    rows = [*leases, *[None] * len(leases)]
    for i, lease in enumerate(rows):
        prompt = tuple(range(10 + i, 210 + i))
        sampling = drawn if i % 2 else greedy
        engine.submit(GenerationRequest(f"{run}-{i}", prompt, sampling, lease), queue.put_nowait)
    n_left = len(rows)
    while n_left:
        event = await queue.get()
        if event.error is not None:
            raise event.error
        n_left -= event.finish is not None


def main(model: Path, out: Path) -> None:
    has_device = torch.cuda.is_available()
    built = build_engine(EngineConfig(), model)
    engine = built.engine
    ranks = islice(cycle(_RANKS), _N_ADAPTERS)
    leases = [random_adapter(built.base_spec, seed, rank) for seed, rank in enumerate(ranks)]
    try:
        asyncio.run(_generate(engine, "warm", leases))
        n_before = engine.stats().n_steps
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            asyncio.run(_generate(engine, "profiled", leases))
            if has_device:
                torch.cuda.synchronize()
        n_steps = engine.stats().n_steps - n_before
        lost = [each._asdict() for each in engine.stats().lost_at_start]
    finally:
        engine.close()
    kernels = [each for each in profiled.key_averages() if each.self_device_time_total > 0]
    total = sum(each.self_device_time_total for each in kernels)
    rows: list[dict[str, Any]] = [
        {
            "kernel": each.key[:90],
            "calls a step": each.count / n_steps,
            "µs a step": each.self_device_time_total / n_steps,
            "share": each.self_device_time_total / total,
        }
        for each in sorted(kernels, key=lambda each: -each.self_device_time_total)[:_N_KERNELS]
    ]
    document = {
        "steps": n_steps,
        "lost at start": lost,
        "µs on the device a step": total / n_steps,
        "kernels": rows,
    }
    out.write_text(json.dumps(document), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
