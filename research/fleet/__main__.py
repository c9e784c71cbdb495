"""`python -m research.fleet`: every policy on every traffic, for a fleet of yours."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from .costs import Costs
from .fleet import FleetShape, Result, simulate
from .policies import POLICIES
from .traffic import TRAFFIC, Workload


def table(results: dict[tuple[str, str], Result]) -> str:
    """Of (traffic, policy), in Markdown."""
    lines = [
        "| traffic | policy | on device | on host | from disk | loads/request | MB read/request "
        "| TTFT p50 | p99 | imbalance |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {kind} | {policy} | {r.device_hits:.1%} | {r.host_hits:.1%} | {r.disk_loads:.1%} "
        f"| {r.device_loads_per_request:.2f} | {r.mb_read_per_request:.2f} "
        f"| {r.ttft_p50_ms:.0f} ms | {r.ttft_p99_ms:.0f} ms | {r.imbalance:.2f} |"
        for (kind, policy), r in results.items()
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--costs", type=Path, required=True, help="JSON, as the fit writes it")
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--load", type=float, default=0.6, help="of what the fleet can serve")
    arguments = parser.parse_args()
    costs = Costs.load(arguments.costs)
    shape = FleetShape(n_replicas=arguments.replicas)
    work = Workload(arguments.adapters, 1.0, arguments.requests)
    each = costs.requests_per_s(work.mean_prompt, work.mean_output, shape.capacity)
    work = work._replace(rate_per_s=arguments.load * arguments.replicas * each)
    results = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for kind, make_traffic in TRAFFIC.items():
            requests = make_traffic(work)
            for name, make in POLICIES.items():
                task = progress.add_task(f"{kind}, {name}", total=len(requests))
                results[kind, name] = simulate(
                    requests,
                    work,
                    shape,
                    costs,
                    make(),
                    on_progress=lambda n, task=task: progress.update(task, completed=n),  # type: ignore[misc]
                )
                progress.remove_task(task)
    print(table(results))


if __name__ == "__main__":
    main()
