"""Fits the simulator's costs to one real server of this machine.

    python -m research.fleet.study.fit [--out research/fleet/results/costs.json]

One thread computes. Prefill: prompts of several lengths, alone. Decode: one to eight rows, with and
without adapters. Medians; least squares where costs are linear. Loads: the server's own seconds, of
the smallest and the largest rank.
"""

import argparse
import asyncio
import json
import os
import random
import statistics
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from rich.progress import track

from loadtests.systems import Target
from research.fleet.costs import Costs, LoadCost
from research.fleet.traffic import BYTES_PER_RANK, RANKS

from .servers import CAPACITY, N_DEVICE, ask, fleet, load_average

N_ADAPTERS = 96
_PROMPT = 16  # tokens of a prompt that hardly counts
_LENGTHS = (16, 64, 128, 256, 448)
_ROWS = (1, 2, 4, 8)


async def measure(target: Target, n_repeats: int) -> dict[str, Any]:
    """Medians in milliseconds, by what was varied."""
    rng = random.Random(0)

    def prompt(n: int) -> list[int]:
        return [rng.randrange(10, 290) for _ in range(n)]  # new each time: nothing is cached

    async def ttft(adapter: str | None, n: int) -> float:
        return (await ask(target, adapter, prompt(n), 1)).ttft_ms

    async def step(adapters: Sequence[str | None]) -> float:
        answers = await asyncio.gather(*(ask(target, a, prompt(_PROMPT), 65) for a in adapters))
        return statistics.median(answer.token_ms for answer in answers)

    def with_rank(rank: int) -> list[str]:
        """Names in which only that rank occurs."""
        return [f"a{i}" for i in range(N_ADAPTERS) if RANKS[i % len(RANKS)] == rank]

    jobs: list[tuple[str, Any, Callable[[], Awaitable[float]]]] = []
    for n in _LENGTHS:
        jobs.append(("prefill", n, lambda n=n: ttft(None, n)))
    for n in _ROWS:
        jobs.append(("decode", n, lambda n=n: step([None] * n)))
    for rank in (RANKS[0], RANKS[-1]):
        jobs.append(("rank", rank, lambda r=rank: step(with_rank(r)[:1] * 4)))
    found: dict[str, dict[Any, list[float]]] = {"prefill": {}, "decode": {}, "rank": {}}
    await asyncio.gather(*(ttft(f"a{i}", _PROMPT) for i in range(N_DEVICE)))
    turns = [job for _ in range(n_repeats) for job in jobs]
    for kind, key, job in track(turns, "steps"):
        found[kind].setdefault(key, []).append(await job())
    loads: dict[str, dict[int, float]] = {"host_to_device": {}, "disk_to_host": {}}
    for rank in track((RANKS[0], RANKS[-1]), "loads"):
        before = await load_seconds(target)
        for _ in range(2):
            for name in with_rank(rank):  # more than fit on the host: each is read from disk
                await ttft(name, _PROMPT)
        after = await load_seconds(target)
        for tier, (n, seconds) in after.items():
            n_before, seconds_before = before[tier]
            loads[tier][rank] = 1000 * (seconds - seconds_before) / (n - n_before)
    return {
        **{
            kind: {key: statistics.median(values) for key, values in by_key.items()}
            for kind, by_key in found.items()
        },
        **loads,
    }


async def load_seconds(target: Target) -> dict[str, tuple[float, float]]:
    """Tier → (loads, their seconds), as the server counts them."""
    async with httpx.AsyncClient() as client:
        text = (await client.get(f"{target.url}/metrics")).text
    values = {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    return {
        tier: (values[f"{metric}_count"], values[f"{metric}_sum"])
        for tier, metric in (
            ("host_to_device", "loraplex_adapter_device_load_seconds"),
            ("disk_to_host", "vllm:lora_adapter_load_seconds"),
        )
    }


def fitted(measured: dict[str, Any]) -> Costs:
    """Least squares through what was measured; a cost that comes out negative is zero."""
    token_ms, first_ms = _line(measured["prefill"])
    row_ms, step_ms = _line(measured["decode"])
    low, high = RANKS[0], RANKS[-1]
    rank_ms = (measured["rank"][high] - measured["rank"][low]) / (4 * (high - low))

    def load(tier: str) -> LoadCost:
        per_byte, fixed = _line({r * BYTES_PER_RANK: ms for r, ms in measured[tier].items()})
        return LoadCost(max(0.0, fixed), max(0.0, per_byte * 1e6))

    return Costs(
        step_ms=max(0.0, step_ms),
        row_ms=max(0.0, row_ms),
        prefill_token_ms=max(0.0, token_ms),
        rank_row_ms=max(0.0, rank_ms),
        overhead_ms=max(0.0, first_ms - step_ms),
        host_to_device=load("host_to_device"),
        disk_to_host=load("disk_to_host"),
    )


def _line(points: dict[int, float]) -> tuple[float, float]:
    """(slope, value at 0) of the least squares through (key, value)."""
    slope, value = np.polyfit(list(points), list(points.values()), 1)
    return float(slope), float(value)


async def fit(target: Target, n_repeats: int) -> dict[str, Any]:
    """``costs`` as `Costs` takes them, and what they were fitted to."""
    measured = await measure(target, n_repeats)
    return {
        "costs": fitted(measured).to_json(),
        "measured_ms": measured,
        "capacity": CAPACITY,
        "load_average": round(load_average(), 1),
        "n_cores": os.cpu_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("research/fleet/results/costs.json"))
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work, fleet(Path(work), 1, N_ADAPTERS) as servers:
        result = asyncio.run(fit(servers[0], arguments.repeats))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["costs"], indent=1))


if __name__ == "__main__":
    main()
