"""A simulated fleet: replays a trace of requests against a policy and counts the cost.

Each replica runs ``capacity`` requests at once, keeps ``n_device`` adapters on the device and
``n_host`` in host memory (both least-recently-used, adapters in use stay), and takes time to bring
an adapter nearer. Snapshots reach the policy ``report_delay_s`` late, queue lengths at once, as in
a real router. Everything follows from the trace and the seed.
"""

from __future__ import annotations

import heapq
import random
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .snapshot import AdapterLocation, ReplicaSnapshot

__all__ = ["Arrival", "Costs", "FleetShape", "Policy", "Result", "simulate"]

Policy = Callable[[Sequence[ReplicaSnapshot], str, int], str]  # → replica id


@dataclass(frozen=True, slots=True)
class Arrival:
    time_s: float
    adapter: str
    prompt_hash: int
    service_s: float  # on a warm adapter, alone in its place
    kills: str | None = None  # instead of a request: this replica is lost
    revives: str | None = None


@dataclass(frozen=True, slots=True)
class FleetShape:
    n_replicas: int = 8
    capacity: int = 16
    n_device: int = 16
    n_host: int = 64
    report_delay_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Costs:
    host_to_device_s: float = 0.02
    disk_to_host_s: float = 0.4


@dataclass(frozen=True, slots=True)
class Result:
    n_requests: int
    device_hits: float  # share of requests that found their adapter on the device
    cold_loads: float  # share that read it from disk
    mean_wait_ms: float  # queueing and loading, before the first token
    p99_wait_ms: float
    imbalance: float  # busiest replica's requests over the mean
    n_retried: int  # requests of a lost replica that ran again elsewhere


@dataclass
class _Replica:
    replica_id: str
    shape: FleetShape
    device: OrderedDict[str, None] = field(default_factory=OrderedDict)
    host: OrderedDict[str, None] = field(default_factory=OrderedDict)
    running: Counter[str] = field(default_factory=Counter)
    queue: deque[tuple[float, Arrival]] = field(default_factory=deque)
    in_flight: dict[int, tuple[float, Arrival]] = field(default_factory=dict)
    alive: bool = True

    @property
    def n_running(self) -> int:
        return len(self.in_flight)

    def report(self) -> ReplicaSnapshot:
        evictable = sum(1 for a in self.device if not self.running[a])
        return ReplicaSnapshot(
            self.replica_id,
            n_pending=self.n_running + len(self.queue),
            capacity=self.shape.capacity,
            device=frozenset(self.device),
            host=frozenset(self.host),
            n_free_slots=self.shape.n_device - len(self.device),
            n_evictable=evictable,
        )

    def fetch(self, adapter: str, costs: Costs) -> tuple[AdapterLocation, float] | None:
        """Brings the adapter to the device; None while every slot is in use."""
        if adapter in self.device:
            self.device.move_to_end(adapter)
            return AdapterLocation.DEVICE, 0.0
        if len(self.device) >= self.shape.n_device:
            idle = next((a for a in self.device if not self.running[a]), None)
            if idle is None:
                return None
            del self.device[idle]
        self.device[adapter] = None
        if adapter in self.host:
            self.host.move_to_end(adapter)
            return AdapterLocation.HOST, costs.host_to_device_s
        if len(self.host) >= self.shape.n_host:
            self.host.popitem(last=False)
        self.host[adapter] = None
        return AdapterLocation.EVICTABLE, costs.host_to_device_s + costs.disk_to_host_s


class _Fleet:
    def __init__(self, shape: FleetShape, costs: Costs, policy: Policy) -> None:
        self.shape, self.costs, self.policy = shape, costs, policy
        self.replicas = {f"r{i}": _Replica(f"r{i}", shape) for i in range(shape.n_replicas)}
        self.reports = {name: r.report() for name, r in self.replicas.items()}
        self.reported_at = 0.0
        self.ends: list[tuple[float, int, str]] = []
        self.serial = 0
        self.waits: list[float] = []
        self.found: Counter[AdapterLocation] = Counter()
        self.served: Counter[str] = Counter()
        self.n_retried = 0

    def arrive(self, now: float, arrival: Arrival, since: float) -> None:
        if now - self.reported_at >= self.shape.report_delay_s:
            self.reports = {name: r.report() for name, r in self.replicas.items()}
            self.reported_at = now
        replica = self.replicas[self.policy(self._view(), arrival.adapter, arrival.prompt_hash)]
        replica.queue.append((since, arrival))
        self._start(replica, now)

    def finish_until(self, now: float) -> None:
        while self.ends and self.ends[0][0] <= now:
            end, serial, name = heapq.heappop(self.ends)
            replica = self.replicas[name]
            started = replica.in_flight.pop(serial, None)
            if started is None:  # the replica was lost meanwhile
                continue
            replica.running[started[1].adapter] -= 1
            self._start(replica, end)

    def lose(self, now: float, name: str) -> None:
        lost = self.replicas[name]
        orphans = [*lost.in_flight.values(), *lost.queue]
        self.replicas[name] = _Replica(name, self.shape, alive=False)
        for since, arrival in orphans:
            self.n_retried += 1
            self.arrive(now, arrival, since)

    def revive(self, name: str) -> None:
        self.replicas[name].alive = True
        self.reports[name] = self.replicas[name].report()

    def _view(self) -> list[ReplicaSnapshot]:
        """Old location, live queue lengths."""
        view = []
        for name, replica in self.replicas.items():
            if replica.alive:
                seen, live = self.reports[name], replica.n_running + len(replica.queue)
                view.append(
                    ReplicaSnapshot(
                        name,
                        live,
                        seen.capacity,
                        seen.device,
                        seen.host,
                        seen.n_free_slots,
                        seen.n_evictable,
                    )
                )
        return view

    def _start(self, replica: _Replica, now: float) -> None:
        while replica.queue and replica.n_running < self.shape.capacity:
            since, arrival = replica.queue[0]
            fetched = replica.fetch(arrival.adapter, self.costs)
            if fetched is None:
                return
            replica.queue.popleft()
            location, delay = fetched
            self.found[location] += 1
            self.served[replica.replica_id] += 1
            self.waits.append(now - since + delay)
            replica.running[arrival.adapter] += 1
            self.serial += 1
            replica.in_flight[self.serial] = (since, arrival)
            end = now + delay + arrival.service_s
            heapq.heappush(self.ends, (end, self.serial, replica.replica_id))


def simulate(
    trace: Sequence[Arrival],
    policy: Policy,
    *,
    shape: FleetShape | None = None,
    costs: Costs | None = None,
) -> Result:
    """Runs the whole trace and lets the fleet finish. ``trace`` is ordered by time."""
    fleet = _Fleet(shape or FleetShape(), costs or Costs(), policy)
    for arrival in trace:
        fleet.finish_until(arrival.time_s)
        if arrival.kills is not None:
            fleet.lose(arrival.time_s, arrival.kills)
        elif arrival.revives is not None:
            fleet.revive(arrival.revives)
        else:
            fleet.arrive(arrival.time_s, arrival, arrival.time_s)
    fleet.finish_until(float("inf"))
    return _summary(fleet)


def _summary(fleet: _Fleet) -> Result:
    waits = sorted(fleet.waits)
    n = len(waits)
    counts = [fleet.served[name] for name in fleet.replicas]
    return Result(
        n_requests=n,
        device_hits=fleet.found[AdapterLocation.DEVICE] / n,
        cold_loads=fleet.found[AdapterLocation.EVICTABLE] / n,
        mean_wait_ms=1000 * sum(waits) / n,
        p99_wait_ms=1000 * waits[min(n - 1, int(0.99 * n))],
        imbalance=max(counts) * len(counts) / sum(counts),
        n_retried=fleet.n_retried,
    )


def random_service(rng: random.Random, mean_s: float) -> float:
    """Generation lengths are skewed: a gamma with shape 2."""
    return rng.gammavariate(2.0, mean_s / 2.0)
