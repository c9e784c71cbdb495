"""Every policy on every traffic, for fleets of 2 to 1,000 replicas, by the costs of a real one.

    python -m research.fleet.study.study [--out research/fleet/results]

Reads costs.json, as `fit` writes it, and computes once more with loads from an object store, which
are assumed, not measured. Writes results.json and a chart, and the tables between the marks of the
page beside that folder.
"""

import argparse
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import Progress

from loraplex_router.replicas.policy import ReplicaRouter
from loraplex_router.replicas.snapshot import ReplicaSnapshot
from research.fleet import TRAFFIC, Costs, FleetShape, LoadCost, Workload, simulate
from research.fleet.policies import POLICIES
from research.fleet.slo import replicas_needed

LOAD = 0.6  # of what a fleet could serve with all adapters on the device
BEGIN, END = "<!-- tables of study.py -->\n", "<!-- end of tables -->\n"


OBJECT_STORE = LoadCost(ms=250.0, ms_per_mb=10.0)  # assumed: a request, and 100 MB/s
_MEASURED, _ASSUMED = "loads as measured, from a local disk", "loads from an object store, assumed"


class Size(NamedTuple):
    n_replicas: int
    n_adapters: int
    n_requests: int


SIZES = (
    Size(2, 100, 2_000),
    Size(10, 1_000, 2_500),
    Size(100, 10_000, 3_000),
    Size(1_000, 100_000, 4_000),
)
SHAPE = FleetShape(n_device=16, host_bytes=128 << 20)
_PROMISE = Size(8, 1_000, 1_000)  # whose traffic the promise is for
_MOST_REPLICAS = 16


def run(costs: Costs, sizes: Sequence[Size], promise: Size) -> dict[str, Any]:
    fleets: list[dict[str, Any]] = []
    n_runs = len(sizes) * len(TRAFFIC) * len(POLICIES)
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("fleets", total=n_runs)
        for size, kind, name in _grid(sizes):
            work = _workload(costs, size)
            requests = TRAFFIC[kind](work)
            shape = FleetShape(
                size.n_replicas, n_device=SHAPE.n_device, host_bytes=SHAPE.host_bytes
            )
            result = simulate(requests, work, shape, costs, POLICIES[name]())
            fleets.append({**size._asdict(), "traffic": kind, "policy": name, **result.to_json()})
            progress.advance(bar)
    promised = _promises(costs, promise)
    return {"load": LOAD, "fleets": fleets, "promise": promised, "decision_us": decision_us()}


def decision_us() -> dict[int, dict[str, float]]:
    """Processor time of one choice: of an adapter that some replica holds, and of one that none
    does; 64 adapters on each device."""
    rng = random.Random(0)
    found = {}
    for n in (1, 10, 100, 1000):
        replicas = [
            ReplicaSnapshot(
                f"r{i}",
                rng.randrange(8),
                8,
                device=frozenset(f"a{rng.randrange(40 * n)}" for _ in range(64)),
                n_evictable=3,
            )
            for i in range(n)
        ]
        held = sorted({name for replica in replicas for name in replica.device})
        found[n] = {
            "held": _choice_us(replicas, [(rng.choice(held),) for _ in range(200)]),
            "cold": _choice_us(replicas, [(f"cold{i}",) for i in range(200)]),
        }
    return found


def page_tables(results: Mapping[str, Any]) -> str:
    """All numbers of the page, in Markdown."""
    return "\n".join(
        f"### {title[0].upper()}{title[1:]}\n\n{tables(one)}" for title, one in results.items()
    )


def tables(results: Mapping[str, Any]) -> str:
    """Of one set of costs."""
    rows = results["fleets"]
    parts: list[str] = []
    for size in dict.fromkeys((r["n_replicas"], r["n_adapters"], r["n_requests"]) for r in rows):
        parts += [f"**{size[0]:,} replicas, {size[1]:,} adapters, {size[2]:,} requests**", ""]
        parts += [
            "| traffic | policy | on device | on host | from disk | loads/request "
            "| MB read/request | TTFT p50 | p99 | imbalance |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        parts += [
            f"| {r['traffic']} | {r['policy']} | {r['device_hits']:.0%} | {r['host_hits']:.0%} "
            f"| {r['disk_loads']:.0%} | {r['device_loads_per_request']:.2f} "
            f"| {r['mb_read_per_request']:.2f} | {r['ttft_p50_ms']:.0f} ms "
            f"| {r['ttft_p99_ms']:.0f} ms | {r['imbalance']:.2f} |"
            for r in rows
            if (r["n_replicas"], r["n_adapters"], r["n_requests"]) == size
        ]
        parts.append("")
    promise = results["promise"]
    names = list(promise["replicas"])
    parts += [
        f"**Replicas that a p99 of {promise['ttft_p99_ms']:.0f} ms needs** at "
        f"{promise['rate_per_s']:.0f} requests/s over {promise['n_adapters']:,} adapters",
        "",
        f"| traffic | {' | '.join(promise['policies'])} |",
        f"| --- |{' --- |' * len(promise['policies'])}",
        *(
            f"| {kind} | "
            + " | ".join(_count(promise["replicas"][kind][p]) for p in promise["policies"])
            + " |"
            for kind in names
        ),
        "",
        "**What a choice takes** of processor time, in the router",
        "",
        "| replicas | adapter held by some | by none |",
        "| --- | --- | --- |",
        *(
            f"| {int(n):,} | {us['held']:.0f} µs | {us['cold']:.0f} µs |"
            for n, us in results["decision_us"].items()
        ),
        "",
    ]
    return "\n".join(parts)


def plot(results: Mapping[str, Any], path: Path) -> None:
    """p99 and loads over the size of the fleet, under Zipf's traffic."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4))
    for name in POLICIES:
        rows = [r for r in results["fleets"] if r["policy"] == name and r["traffic"] == "zipf"]
        sizes = [r["n_replicas"] for r in rows]
        left.loglog(sizes, [r["ttft_p99_ms"] for r in rows], marker="o", label=name)
        right.semilogx(sizes, [r["mb_read_per_request"] for r in rows], marker="o", label=name)
    left.set(xlabel="replicas", ylabel="TTFT p99, ms")
    right.set(xlabel="replicas", ylabel="MB read for a request", ylim=0)
    left.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _grid(sizes: Sequence[Size]) -> Iterator[tuple[Size, str, str]]:
    for size in sizes:
        for kind in TRAFFIC:
            for name in POLICIES:
                yield size, kind, name


def _workload(costs: Costs, size: Size) -> Workload:
    work = Workload(size.n_adapters, 1.0, size.n_requests)
    each = costs.requests_per_s(work.mean_prompt, work.mean_output, SHAPE.capacity)
    return work._replace(rate_per_s=LOAD * size.n_replicas * each)


def _promises(costs: Costs, size: Size) -> dict[str, Any]:
    work = _workload(costs, size)
    # Four times a mean prompt's prefill and a load from disk: hardly any queue.
    alone = costs.step(0, 0, work.mean_prompt) + costs.overhead_ms
    load = costs.disk_to_host.of(work.n_bytes(3)) + costs.host_to_device.of(work.n_bytes(3))
    promise_ms = 4 * alone + load
    return {
        "ttft_p99_ms": round(promise_ms, 1),
        "rate_per_s": round(work.rate_per_s, 1),
        "n_adapters": size.n_adapters,
        "policies": list(POLICIES),
        "replicas": {
            kind: {
                name: replicas_needed(
                    make_traffic,
                    work,
                    SHAPE,
                    costs,
                    make,
                    ttft_p99_ms=promise_ms,
                    at_most=_MOST_REPLICAS,
                )
                for name, make in POLICIES.items()
            }
            for kind, make_traffic in TRAFFIC.items()
        },
    }


def _choice_us(replicas: Sequence[ReplicaSnapshot], wanted: Sequence[tuple[str, ...]]) -> float:
    router = ReplicaRouter()
    began = time.process_time()
    for n, digests in enumerate(wanted):
        router.rank(replicas, digests, n + 1, n / 100)
    return round(1e6 * (time.process_time() - began) / len(wanted), 1)


def _count(n: int | None) -> str:
    return f"over {_MOST_REPLICAS}" if n is None else str(n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("research/fleet/results"))
    arguments = parser.parse_args()
    costs = Costs.load(arguments.out / "costs.json")
    results = {
        _MEASURED: run(costs, SIZES, _PROMISE),
        _ASSUMED: run(replace(costs, disk_to_host=OBJECT_STORE), SIZES[1:2], _PROMISE),
    }
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    plot(results[_MEASURED], arguments.out / "zipf.svg")
    page = arguments.out.with_suffix(".md")
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(before + BEGIN + "\n" + page_tables(results) + "\n" + END + after)


if __name__ == "__main__":
    main()
