"""One simulated replica: steps of decode rows and prefill chunks, adapters in three tiers.

It moves from one *phase* to the next: a step with prefill tokens in it, or as many equal decode
steps as fit before a row ends. Whoever comes in between cuts the phase at the end of its step, as a
real engine admits between steps. Loads run beside the steps, one at a time.
"""

import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from loraplex_router.replicas.snapshot import ReplicaSnapshot

from .costs import Costs
from .traffic import Request, Workload


@dataclass(frozen=True, slots=True)
class FleetShape:
    n_replicas: int = 2
    capacity: int = 8  # rows of a step
    step_tokens: int = 128
    n_device: int = 6  # adapters
    host_bytes: int = 12 << 20
    report_delay_s: float = 1.0
    prefix_tokens: int = 64  # with which prompts of one prefix begin
    n_prefixes_cached: int = 64  # on a replica


class Tier(IntEnum):
    DEVICE = 0
    HOST = 1
    DISK = 2


class Served(NamedTuple):
    request: Request
    ttft_ms: float
    tier: Tier  # where the adapter was when the request came
    replica: int


@dataclass(slots=True, eq=False)
class _Row:
    request: Request
    tier: Tier
    rank: int
    n_prefill: int  # tokens that are left
    n_output: int


@dataclass(slots=True)
class _Phase:
    begin_ms: float
    step_ms: float
    n_steps: int
    n_prefill: int  # tokens of the one step; 0: decode alone

    @property
    def end_ms(self) -> float:
        return self.begin_ms + self.step_ms * self.n_steps


@dataclass(slots=True)
class SimulatedReplica:
    """All times in milliseconds. ``wake_ms`` says when to call `advance` next; None: when idle."""

    number: int
    shape: FleetShape
    costs: Costs
    work: Workload
    wake_ms: float | None = None
    n_device_loads: int = 0
    n_disk_loads: int = 0
    n_bytes_read: int = 0
    _rows: list[_Row] = field(default_factory=list)
    _waiting: deque[_Row] = field(default_factory=deque)
    _phase: _Phase | None = None
    _leases: OrderedDict[int, int] = field(default_factory=OrderedDict)  # on the device, oldest 1st
    _ready_ms: dict[int, float] = field(default_factory=dict)  # of adapters that are being loaded
    _host: OrderedDict[int, int] = field(default_factory=OrderedDict)  # adapter → bytes
    _host_used: int = 0
    _loader_free_ms: float = 0.0
    _prefixes: OrderedDict[tuple[int, int], None] = field(default_factory=OrderedDict)

    @property
    def n_pending(self) -> int:
        return len(self._rows) + len(self._waiting)

    def arrive(self, now_ms: float, request: Request) -> list[Served]:
        """Queues the request; returns what the cut phase had finished."""
        served = self._cut(now_ms)
        adapter = request.adapter
        tier = self._tier(adapter)
        rank = self.work.rank(adapter)
        self._lease(now_ms, adapter)
        self._waiting.append(_Row(request, tier, rank, request.n_prompt, request.n_output))
        if self._phase is None:
            self._next_phase(now_ms)
        return served

    def advance(self, now_ms: float) -> list[Served]:
        """To be called at ``wake_ms``."""
        served = self._cut(now_ms)
        if self._phase is None:
            self._next_phase(now_ms)
        return served

    def report(self, names: list[str]) -> ReplicaSnapshot:
        """``names``: of adapters by number."""
        idle = sum(1 for n_leases in self._leases.values() if n_leases == 0)
        return ReplicaSnapshot(
            f"r{self.number}",
            self.n_pending,
            self.shape.capacity,
            device=frozenset(names[a] for a in self._leases),
            host=frozenset(names[a] for a in self._host),
            n_free_slots=self.shape.n_device - len(self._leases),
            n_evictable=idle,
            n_pending_ranks=sum(r.rank for r in self._rows) + sum(r.rank for r in self._waiting),
        )

    def _tier(self, adapter: int) -> Tier:
        if adapter in self._leases:
            return Tier.DEVICE
        return Tier.HOST if adapter in self._host else Tier.DISK

    def _cut(self, now_ms: float) -> list[Served]:
        """Ends the phase at the end of the step that runs at ``now_ms``, if that is sooner."""
        phase = self._phase
        if phase is None:
            return []
        if now_ms < phase.end_ms:
            phase.n_steps = max(1, math.ceil((now_ms - phase.begin_ms) / phase.step_ms))
            self.wake_ms = phase.end_ms
            return []
        self._phase = None
        return self._finish(phase)

    def _finish(self, phase: _Phase) -> list[Served]:
        """Applies a phase that has ended."""
        served = []
        chunk = phase.n_prefill
        ended = False
        for row in self._rows:
            if row.n_prefill == 0:
                row.n_output -= phase.n_steps
            elif chunk:
                took = min(chunk, row.n_prefill)
                chunk -= took
                row.n_prefill -= took
                if row.n_prefill:
                    continue
                row.n_output -= 1
                ttft = phase.end_ms - 1000 * row.request.time_s + self.costs.overhead_ms
                served.append(Served(row.request, ttft, row.tier, self.number))
            ended = ended or row.n_output <= 0
        if ended:
            for row in self._rows:
                if row.n_prefill == 0 and row.n_output <= 0:
                    self._leases[row.request.adapter] -= 1
            self._rows = [r for r in self._rows if r.n_prefill or r.n_output > 0]
        return served

    def _next_phase(self, now_ms: float) -> None:
        self._admit(now_ms)
        shape = self.shape
        decoding = [row for row in self._rows if row.n_prefill == 0]
        n_ranks = sum(row.rank for row in decoding)
        wanted = sum(row.n_prefill for row in self._rows)
        n_prefill = min(wanted, shape.step_tokens - len(decoding))
        soonest = min((t for t in self._ready_ms.values() if t > now_ms), default=None)
        if not self._rows:
            self.wake_ms = soonest
            return
        step_ms = self.costs.step(len(decoding), n_ranks, n_prefill)
        n_steps = 1
        if n_prefill == 0:
            n_steps = min(row.n_output for row in decoding)
            if soonest is not None:  # a load ends: who waits for it is admitted then
                n_steps = min(n_steps, max(1, math.ceil((soonest - now_ms) / step_ms)))
        self._phase = _Phase(now_ms, step_ms, n_steps, n_prefill)
        self.wake_ms = self._phase.end_ms

    def _admit(self, now_ms: float) -> None:
        """First come, first served, but nobody waits for another's adapter."""
        for adapter in [a for a, ready in self._ready_ms.items() if ready <= now_ms]:
            del self._ready_ms[adapter]
        still: deque[_Row] = deque()
        while self._waiting:
            row = self._waiting.popleft()
            adapter = row.request.adapter
            placed = adapter in self._leases or self._load(now_ms, adapter)
            if not placed or adapter in self._ready_ms or len(self._rows) >= self.shape.capacity:
                still.append(row)
                continue
            self._leases[adapter] += 1
            self._leases.move_to_end(adapter)
            row.n_prefill = max(1, row.n_prefill - self._cached(row.request))
            self._rows.append(row)
        self._waiting = still

    def _load(self, now_ms: float, adapter: int) -> bool:
        """Begins to bring the adapter to the device; False while every place is in use."""
        if len(self._leases) >= self.shape.n_device:
            wanted = {row.request.adapter for row in self._waiting}
            idle = next(
                (
                    a
                    for a, n in self._leases.items()
                    if n == 0 and a not in self._ready_ms and a not in wanted
                ),
                None,
            )
            if idle is None:
                return False
            del self._leases[idle]
        self.n_device_loads += 1
        self._loader_free_ms = max(now_ms, self._loader_free_ms)
        self._loader_free_ms += self.costs.host_to_device.of(self.work.n_bytes(adapter))
        self._leases[adapter] = 0
        self._ready_ms[adapter] = self._loader_free_ms
        return True

    def _lease(self, now_ms: float, adapter: int) -> None:
        """A request leases the content in host memory, also of an adapter that is on the device:
        what has left the host is read again."""
        if adapter in self._host:
            self._host.move_to_end(adapter)
            return
        n_bytes = self.work.n_bytes(adapter)
        while self._host and self._host_used + n_bytes > self.shape.host_bytes:
            self._host_used -= self._host.popitem(last=False)[1]
        self._host[adapter] = n_bytes
        self._host_used += n_bytes
        self.n_disk_loads += 1
        self.n_bytes_read += n_bytes
        self._loader_free_ms = max(now_ms, self._loader_free_ms)
        self._loader_free_ms += self.costs.disk_to_host.of(n_bytes)
        self._ready_ms[adapter] = self._loader_free_ms

    def _cached(self, request: Request) -> int:
        """Tokens of the prompt that the prefix cache has; it has the prefix from now on."""
        key = (request.adapter, request.prefix)
        n = min(self.shape.prefix_tokens, request.n_prompt) if key in self._prefixes else 0
        self._prefixes[key] = None
        self._prefixes.move_to_end(key)
        if len(self._prefixes) > self.shape.n_prefixes_cached:
            self._prefixes.popitem(last=False)
        return n
