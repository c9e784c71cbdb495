"""`python -m loraplex_router.replicas.compare`: every policy on every trace, as a table."""

from __future__ import annotations

from .simulator import Result, simulate
from .traces import POLICIES, TRACES

__all__ = ["compare", "table"]


def compare(*, n_requests: int = 20_000, seed: int = 0) -> dict[tuple[str, str], Result]:
    """(trace, policy) → result; the policies of a trace see the same requests."""
    results = {}
    for trace_name, make_trace in TRACES.items():
        trace = make_trace(seed=seed, n_requests=n_requests)
        for policy_name, make_policy in POLICIES.items():
            results[trace_name, policy_name] = simulate(trace, make_policy())
    return results


def table(results: dict[tuple[str, str], Result]) -> str:
    lines = [
        "| trace | policy | on device | from disk | mean wait | p99 wait | imbalance | retried |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {trace} | {policy} | {r.device_hits:.1%} | {r.cold_loads:.1%} "
        f"| {r.mean_wait_ms:.0f} ms | {r.p99_wait_ms:.0f} ms | {r.imbalance:.2f} | {r.n_retried} |"
        for (trace, policy), r in results.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(compare()))
