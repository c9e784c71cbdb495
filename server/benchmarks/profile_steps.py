"""Profiles decode steps of a running engine: which kernels a step's time goes to.

    python server/benchmarks/profile_steps.py MODEL OUT.json

Needs a CUDA device; ``make gpu-report`` runs it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from loraplex_server.engine.build import build_engine
from loraplex_server.engine.client import GenerationRequest
from loraplex_server.engine.config import EngineConfig
from loraplex_server.engine.engine import Engine
from loraplex_server.engine.events import TokenEvent
from loraplex_server.engine.sampling_params import SamplingParams

_N_REQUESTS, _N_TOKENS, _N_KERNELS = 64, 21, 25  # 20 steps decode


async def _generate(engine: Engine, run: str) -> None:
    queue: asyncio.Queue[TokenEvent] = asyncio.Queue()
    sampling = SamplingParams(max_tokens=_N_TOKENS, temperature=0.0, ignore_eos=True)
    for i in range(_N_REQUESTS):
        prompt = tuple(range(10 + i, 210 + i))
        engine.submit(GenerationRequest(f"{run}-{i}", prompt, sampling), queue.put_nowait)
    n_left = _N_REQUESTS
    while n_left:
        n_left -= (await queue.get()).finish is not None


def main(model: Path, out: Path) -> None:
    engine = build_engine(EngineConfig(), model).engine
    try:
        asyncio.run(_generate(engine, "warm"))
        n_before = engine.stats().n_steps
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            asyncio.run(_generate(engine, "profiled"))
            torch.cuda.synchronize()
        n_steps = engine.stats().n_steps - n_before
    finally:
        engine.close()
    kernels = [e for e in profiled.key_averages() if e.self_device_time_total > 0]
    total = sum(e.self_device_time_total for e in kernels)
    rows: list[dict[str, Any]] = [
        {
            "kernel": e.key[:90],
            "calls a step": e.count / n_steps,
            "µs a step": e.self_device_time_total / n_steps,
            "share": e.self_device_time_total / total,
        }
        for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:_N_KERNELS]
    ]
    document = {"steps": n_steps, "µs on the device a step": total / n_steps, "kernels": rows}
    out.write_text(json.dumps(document), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
