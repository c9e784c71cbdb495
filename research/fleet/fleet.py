"""The clock of a simulated fleet: arrivals in order, phases of replicas from a heap.

A policy sees queue lengths at once and places of adapters as old as the last report, as a gateway
does. Everything follows from the requests and the policy's seed.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np

from loraplex_router.replicas.snapshot import ReplicaSnapshot

from .costs import Costs
from .replica import FleetShape, Served, SimulatedReplica, Tier
from .traffic import Request, Workload

__all__ = ["FleetShape", "Policy", "Result", "simulate"]

WARM_UP = 0.25  # of the requests: not counted, caches fill


class Policy(Protocol):
    def __call__(
        self, replicas: Sequence[ReplicaSnapshot], name: str, prompt_hash: int, now_s: float
    ) -> int:
        """The index of the replica for an adapter."""


@dataclass(frozen=True, slots=True)
class Result:
    """Of the requests after the warm-up. Shares are of requests."""

    n_requests: int
    device_hits: float
    host_hits: float
    disk_loads: float
    device_loads_per_request: float
    disk_loads_per_request: float
    mb_read_per_request: float  # from disk or an object store
    ttft_mean_ms: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    imbalance: float  # the busiest replica's requests over the mean

    def to_json(self) -> dict[str, Any]:
        return {key: round(value, 4) for key, value in asdict(self).items()}


def simulate(
    requests: Sequence[Request],
    work: Workload,
    shape: FleetShape,
    costs: Costs,
    policy: Policy,
    *,
    on_progress: Callable[[int], None] = lambda n: None,
) -> Result:
    """Runs all requests, ordered by time, to their ends. ``on_progress`` gets how many came."""
    fleet = _Fleet(work, shape, costs, policy)
    n_warm = int(WARM_UP * len(requests))
    before = (0, 0, 0)
    for n, request in enumerate(requests):
        if n == n_warm:
            before = fleet.loads()
        fleet.arrive(request)
        if n % 256 == 0:
            on_progress(n)
    fleet.run_until(float("inf"))
    counted_from = requests[n_warm].time_s
    served = [one for one in fleet.served if one.request.time_s >= counted_from]
    loads = tuple(a - b for a, b in zip(fleet.loads(), before, strict=True))
    return _summary(served, loads, shape.n_replicas)


class _Fleet:
    def __init__(self, work: Workload, shape: FleetShape, costs: Costs, policy: Policy) -> None:
        self.shape, self.policy = shape, policy
        self.names = [f"a{i}" for i in range(work.n_adapters)]
        self.replicas = [SimulatedReplica(i, shape, costs, work) for i in range(shape.n_replicas)]
        self.view = [replica.report(self.names) for replica in self.replicas]
        self.changed: set[int] = set()  # since the last report
        self.report_at_s = 0.0
        self.wakes: list[tuple[float, int]] = []
        self.served: list[Served] = []

    def arrive(self, request: Request) -> None:
        now_ms = 1000 * request.time_s
        self.run_until(now_ms)
        if request.time_s >= self.report_at_s:
            for i in self.changed:
                self.view[i] = self.replicas[i].report(self.names)
            self.changed.clear()
            self.report_at_s = request.time_s + self.shape.report_delay_s
        name = self.names[request.adapter]
        prompt_hash = request.adapter << 20 | request.prefix + 1
        index = self.policy(self.view, name, prompt_hash, request.time_s)
        replica = self.replicas[index]
        self.served += replica.arrive(now_ms, request)
        self._after(index)

    def run_until(self, now_ms: float) -> None:
        wakes, replicas = self.wakes, self.replicas
        while wakes and wakes[0][0] <= now_ms:
            wake_ms, index = heapq.heappop(wakes)
            if replicas[index].wake_ms != wake_ms:  # it was cut, and has another entry
                continue
            self.served += replicas[index].advance(wake_ms)
            self._after(index)

    def loads(self) -> tuple[int, int, int]:
        """(loads to a device, loads from disk, bytes of those) so far."""
        return (
            sum(replica.n_device_loads for replica in self.replicas),
            sum(replica.n_disk_loads for replica in self.replicas),
            sum(replica.n_bytes_read for replica in self.replicas),
        )

    def _after(self, index: int) -> None:
        replica = self.replicas[index]
        if replica.wake_ms is not None:
            heapq.heappush(self.wakes, (replica.wake_ms, index))
        self.changed.add(index)
        if self.view[index].n_pending != replica.n_pending:
            self.view[index] = replace(self.view[index], n_pending=replica.n_pending)


def _summary(served: Sequence[Served], loads: tuple[int, ...], n_replicas: int) -> Result:
    n_device_loads, n_disk_loads, n_bytes = loads
    n = len(served)
    ttft = np.array([one.ttft_ms for one in served])
    tiers = np.bincount([one.tier for one in served], minlength=len(Tier)) / n
    by_replica = np.bincount([one.replica for one in served], minlength=n_replicas)
    return Result(
        n_requests=n,
        device_hits=float(tiers[Tier.DEVICE]),
        host_hits=float(tiers[Tier.HOST]),
        disk_loads=float(tiers[Tier.DISK]),
        device_loads_per_request=n_device_loads / n,
        disk_loads_per_request=n_disk_loads / n,
        mb_read_per_request=n_bytes / n / 1e6,
        ttft_mean_ms=float(ttft.mean()),
        ttft_p50_ms=float(np.quantile(ttft, 0.5)),
        ttft_p99_ms=float(np.quantile(ttft, 0.99)),
        imbalance=float(by_replica.max() / by_replica.mean()),
    )
