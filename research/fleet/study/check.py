"""The simulator against two real replicas: the same requests, the same policy, both measured.

    python -m research.fleet.study.check [--out research/fleet/results/check.json]

Two `loraplex serve` processes, one computing thread each, behind a router in this process. One of
them alone is measured first, and the simulator's costs are fitted to that; the fit and the check
are of the same minutes, since the machine may be slower in others. Writes check.json.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from rich.progress import Progress

from loadtests.systems import Target
from loraplex_router.replicas.snapshot import ReplicaSnapshot
from research.fleet import TRAFFIC, Costs, FleetShape, Request, Workload, simulate
from research.fleet.fleet import WARM_UP, Policy
from research.fleet.policies import POLICIES

from .fit import N_ADAPTERS, fit
from .servers import CAPACITY, N_DEVICE, N_HOST_MIB, STEP_TOKENS, ask, fleet, load_average

SHAPE = FleetShape(2, CAPACITY, STEP_TOKENS, N_DEVICE, N_HOST_MIB << 20)
LOAD = 0.1  # of what two replicas could serve with a core each; others use the cores, too
N_REQUESTS = 400
REPORT_S = SHAPE.report_delay_s
_COUNTERS = ("loraplex_adapter_loads_total", "loraplex_host_tier_loads_total")


class FleetRouter:
    """Sends requests where the policy says: queue lengths are its own, places are scraped."""

    def __init__(self, targets: Sequence[Target], policy: Policy) -> None:
        self._targets, self._policy = targets, policy
        self._client = httpx.AsyncClient()
        self.replicas = [ReplicaSnapshot(f"r{i}", 0, SHAPE.capacity) for i in range(len(targets))]

    async def scrape_for_ever(self) -> None:
        while True:
            await self.scrape()
            await asyncio.sleep(REPORT_S)

    async def scrape(self) -> None:
        for i, target in enumerate(self._targets):
            text = (await self._client.get(f"{target.url}/metrics")).text
            levels: dict[str, set[str]] = {"gpu": set(), "cpu": set()}
            for family in text_string_to_metric_families(text):
                if family.name == "vllm:lora_adapter_loaded":
                    for sample in family.samples:
                        levels[sample.labels["level"]].add(sample.labels["adapter_name"])
            self.replicas[i] = replace(
                self.replicas[i],
                device=frozenset(levels["gpu"]),
                host=frozenset(levels["cpu"] | levels["gpu"]),
                n_free_slots=SHAPE.n_device - len(levels["gpu"]),
                n_evictable=len(levels["gpu"]),
            )

    async def counters(self) -> dict[str, float]:
        """Summed over the replicas."""
        totals = dict.fromkeys(_COUNTERS, 0.0)
        for target in self._targets:
            text = (await self._client.get(f"{target.url}/metrics")).text
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    if sample.name in totals:
                        totals[sample.name] += sample.value
        return totals

    async def send(self, request: Request, prompt: Sequence[int], now_s: float) -> float:
        """The time to the first token in milliseconds, the router's own time counted."""
        began = time.perf_counter()
        name = f"a{request.adapter}"
        prompt_hash = request.adapter << 20 | request.prefix + 1
        index = self._policy(self.replicas, name, prompt_hash, now_s)
        self._count(index, 1)
        chosen = time.perf_counter()
        try:
            answer = await ask(self._targets[index], name, prompt, request.n_output)
        finally:
            self._count(index, -1)
        return answer.ttft_ms + 1000 * (chosen - began)

    def _count(self, index: int, change: int) -> None:
        now = self.replicas[index]
        self.replicas[index] = replace(now, n_pending=now.n_pending + change)


async def replay(
    targets: Sequence[Target], requests: Sequence[Request], policy: Policy, title: str
) -> dict[str, float]:
    """Sends the requests at their times; what is measured leaves the warm-up out."""
    rng = random.Random(0)
    prefixes: dict[tuple[int, int], list[int]] = {}
    prompts = []
    for r in requests:
        prefix = prefixes.setdefault(
            (r.adapter, r.prefix), [rng.randrange(10, 290) for _ in range(SHAPE.prefix_tokens)]
        )
        rest = [rng.randrange(10, 290) for _ in range(r.n_prompt)]
        prompts.append([*prefix, *rest][: r.n_prompt])
    router = FleetRouter(targets, policy)
    await router.scrape()
    scraping = asyncio.create_task(router.scrape_for_ever())
    n_warm = int(WARM_UP * len(requests))
    sent: list[asyncio.Task[float]] = []
    before: dict[str, float] = {}
    began, late = time.perf_counter(), []
    with Progress() as progress:
        bar = progress.add_task(title, total=len(requests))
        for n, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
            await asyncio.sleep(max(0.0, began + request.time_s - time.perf_counter()))
            late.append(1000 * (time.perf_counter() - began - request.time_s))
            if n == n_warm:
                before = await router.counters()
            sent.append(asyncio.create_task(router.send(request, prompt, request.time_s)))
            progress.update(bar, completed=n + 1)
        ttft = np.array(await asyncio.gather(*sent))[n_warm:]
    scraping.cancel()
    after = await router.counters()
    loads, disk = (after[name] - before[name] for name in _COUNTERS)
    return {
        "ttft_p50_ms": round(float(np.quantile(ttft, 0.5)), 1),
        "ttft_p99_ms": round(float(np.quantile(ttft, 0.99)), 1),
        "device_loads_per_request": round(loads / len(ttft), 3),
        "disk_loads_per_request": round(disk / len(ttft), 3),
        "requests_sent_late_ms": round(statistics.median(late), 1),
    }


async def check(targets: Sequence[Target], n_repeats: int) -> dict[str, Any]:
    """The fit, and what was measured and simulated by policy."""
    fit_of_one = await fit(targets[0], n_repeats)
    costs = Costs.from_json(fit_of_one["costs"])
    work = Workload(N_ADAPTERS, 1.0, N_REQUESTS)
    each = costs.requests_per_s(work.mean_prompt, work.mean_output, CAPACITY)
    work = work._replace(rate_per_s=round(LOAD * len(targets) * each, 2))
    requests = TRAFFIC["zipf"](work)
    runs = {}
    for name in ("loraplex", "round robin"):
        measured = await replay(targets, requests, POLICIES[name](), name)
        result = simulate(requests, work, SHAPE, costs, POLICIES[name]())
        simulated = {
            "ttft_p50_ms": round(result.ttft_p50_ms, 1),
            "ttft_p99_ms": round(result.ttft_p99_ms, 1),
            "device_loads_per_request": round(result.device_loads_per_request, 3),
            "disk_loads_per_request": round(result.disk_loads_per_request, 3),
        }
        runs[name] = {
            "measured": measured,
            "simulated": simulated,
            "error": {
                key: round(value / measured[key] - 1, 2) if measured[key] else None
                for key, value in simulated.items()
            },
        }
    return {
        "fit": fit_of_one,
        "rate_per_s": work.rate_per_s,
        "n_requests": N_REQUESTS,
        "n_adapters": work.n_adapters,
        "load_average": round(load_average(), 1),
        "policies": runs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("research/fleet/results/check.json"))
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work, fleet(Path(work), 2, N_ADAPTERS) as targets:
        summary = asyncio.run(check(targets, arguments.repeats))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary["policies"], indent=1))


if __name__ == "__main__":
    main()
