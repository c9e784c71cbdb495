"""Requests metrics, calls and adapters from all other processes of a cluster."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import merge
from itertools import islice
from operator import itemgetter
from typing import Any, Literal, NamedTuple, TypeVar

from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from loraplex_router.experts.load import ExpertLoad
from loraplex_server.api.fleet import Calls
from loraplex_server.api.state import AppState
from loraplex_server.call_log import N_ENDED
from loraplex_server.cluster.replica.remote_request import ReplicaStats
from loraplex_server.health_tracker import Degradation
from loraplex_server.metrics.collector import LoraplexCollector, fault_family
from loraplex_server.metrics.engine_families import names_by_digest
from loraplex_server.metrics.live_view import MAX_ROWS, percentiles
from loraplex_server.metrics.routing_collector import expert_families

from .remote_engine import RemoteEngine

Role = Literal["gateway", "coordinator"]
_ANSWER_TIMEOUT_S = 5.0
_FRONTS = ("Gateway", "Coordinator")  # deployments with the HTTP application
_MAX_ADAPTERS = 512  # listed for a replica
_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class FrontReport:
    """Crosses processes. Calls are JSON; see ``CallRecord``."""

    replica: str  # Ray's name of the process
    role: Role
    running: list[dict[str, Any]]  # oldest first
    ended: list[dict[str, Any]]  # newest first
    tokens_per_s: dict[str, float]  # prompt, output
    first_token_s: list[float]  # of the last minute, ascending
    gap_s: list[float]  # between tokens, of the last minute, ascending

    @staticmethod
    def of(
        replica: str, role: Role, services: AppState, tenant: str | None, n_ended: int
    ) -> FrontReport:
        """``tenant`` None: the calls of all tenants. ``n_ended``: most ended calls to return."""
        calls = services.metrics.calls
        rates = services.live_view.to_json()["tokens_per_s"]
        assert isinstance(rates, dict)
        return FrontReport(
            replica,
            role,
            running=[record.to_json() for record in calls.running(tenant)],
            ended=[record.to_json() for record in islice(calls.ended(tenant), n_ended)],
            tokens_per_s=rates,
            first_token_s=calls.first_token_s.values(),
            gap_s=calls.gap_s.values(),
        )


class ProcessMetrics(NamedTuple):
    replica: str
    families: Sequence[Metric]


def one_page(processes: Iterable[ProcessMetrics]) -> bytes:
    """Return all samples in Prometheus' text format, each family once."""
    merged: dict[str, Metric] = {}
    for process in processes:
        for family in process.families:
            target = merged.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            target.samples += [
                sample._replace(labels={**sample.labels, "replica": process.replica})
                for sample in family.samples
            ]
    return generate_latest(_Page(merged.values()))


class _Page(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


class ClusterFleet:
    """The ``Fleet`` of a cluster. Event loop only."""

    def __init__(self, replica: str, engine: RemoteEngine) -> None:
        """``replica``: Ray's name of this process."""
        self._replica = replica
        self._engine = engine
        self._application = serve.get_replica_context().app_name

    async def metrics_page(self, collector: LoraplexCollector) -> bytes:
        fronts = await self._ask_fronts("metrics", ProcessMetrics)
        families, names = collector.engine_families, names_by_digest(collector.listing)
        engines = [
            ProcessMetrics(
                each.replica,
                [
                    *families(each.engine, alive=each.alive),
                    *expert_families(each.expert_loads, names),
                    fault_family(each.faults),
                ],
            )
            for each in self._engine.replicas
        ]
        return one_page([*fronts, *engines])

    @property
    def degraded(self) -> Sequence[Degradation]:
        return [part for each in self._engine.replicas for part in each.degraded]

    async def view(self, collector: LoraplexCollector) -> dict[str, object]:
        names = names_by_digest(collector.listing)
        return {
            "name": self._application,
            "age_s": self._engine.age_s,
            "engines": [_engine(each, names) for each in self._engine.replicas],
            "fronts": [
                {
                    "replica": front.replica,
                    "role": front.role,
                    "calls": len(front.running),
                    "answers": front.replica == self._replica,
                }
                for front in await self._reports()
            ],
        }

    async def calls(self, tenant: str | None) -> Calls:
        fronts = await self._reports(tenant, N_ENDED)
        running = merge(*(front.running for front in fronts), key=itemgetter("started"))
        ended = merge(*(front.ended for front in fronts), key=_ended, reverse=True)
        return Calls(list(running), list(islice(ended, N_ENDED)))

    async def live(self, seen: Mapping[str, object]) -> dict[str, object]:
        fronts, engines = await self._reports(), self._engine.replicas
        rows = merge(*(front.running for front in fronts), key=itemgetter("started"))
        adapters, n_bytes = seen["adapters"], seen["bytes"]
        assert isinstance(adapters, dict)
        assert isinstance(n_bytes, dict)
        host = {
            "used": sum(engine.host_bytes_used for engine in engines),
            "total": sum(engine.host_bytes_total for engine in engines),
        }
        return {
            **seen,
            "adapters": {**adapters, "host": sum(len(e.host_adapters) for e in engines)},
            "bytes": {**n_bytes, "host": host},
            "tokens_per_s": {
                kind: sum(front.tokens_per_s[kind] for front in fronts)
                for kind in ("prompt", "output")
            },
            "first_token_s": percentiles(list(merge(*(f.first_token_s for f in fronts)))),
            "gap_s": percentiles(list(merge(*(f.gap_s for f in fronts)))),
            "rows": list(islice(rows, MAX_ROWS)),
        }

    async def expert_load(self, digest: str, window_s: float) -> ExpertLoad:
        loads = await self._engine.ask_all("expert_load", digest, window_s)
        return ExpertLoad.joined(load for load in loads if isinstance(load, ExpertLoad))

    async def unload(self, digest: str) -> int:
        return sum(await self._ask_fronts("unload", int, digest))

    async def _reports(self, tenant: str | None = None, n_ended: int = 0) -> list[FrontReport]:
        return await self._ask_fronts("report", FrontReport, tenant, n_ended)

    async def _ask_fronts(self, method: str, kind: type[T], *arguments: object) -> list[T]:
        """Return the answers of ``FrontProcess.method`` in all processes.

        Leaves out a deployment of which a process does not answer in time.
        """
        requests = [
            serve.get_deployment_handle(name, app_name=self._application)
            .broadcast(method, *arguments)
            .results_async(timeout_s=_ANSWER_TIMEOUT_S)
            for name in _FRONTS
        ]
        results: list[T] = []
        for answers in await asyncio.gather(*requests, return_exceptions=True):
            if isinstance(answers, (RayError, RayServeException, TimeoutError)):
                _log.info("%s: a process does not answer: %s", method, answers)
            elif isinstance(answers, BaseException):
                raise answers
            else:
                results += [answer for answer in answers if isinstance(answer, kind)]
        return results


def _engine(replica: ReplicaStats, names: Mapping[str, str]) -> dict[str, object]:
    stats = replica.engine
    return {
        "replica": replica.replica,
        "alive": replica.alive,
        "running": stats.n_running,
        "waiting": stats.n_waiting,
        "rows": {"used": stats.n_running, "total": stats.max_batch_size},
        "steps": stats.n_steps,
        "step_age_s": stats.step_age_s,
        "preemptions": stats.n_preemptions,
        "kv_pages": {"used": stats.kv_pages_used, "total": stats.kv_pages_total},
        "bytes": {
            "device": {"used": stats.pool_bytes_used, "total": stats.pool_bytes_total},
            "host": {"used": replica.host_bytes_used, "total": replica.host_bytes_total},
        },
        "slots": stats.pool_slots_total,
        "loads": stats.n_adapter_loads,
        "evictions": stats.n_adapter_evictions,
        "adapters": _adapters(replica, names),
    }


def _adapters(replica: ReplicaStats, names: Mapping[str, str]) -> list[dict[str, object]]:
    """List the adapters on the device, then those in host memory only."""
    on_device = dict.fromkeys(replica.engine.resident_adapters, "device")
    tiers = on_device | {d: "host" for d in replica.host_adapters if d not in on_device}
    return [
        {
            "name": names.get(digest, digest[:12]),
            "digest": digest,
            "tier": tier,
            "running": replica.engine.running_adapters.get(digest, 0),
            "waiting": replica.engine.waiting_adapters.get(digest, 0),
            "requests": replica.adapter_requests.get(digest, 0),
        }
        for digest, tier in islice(tiers.items(), _MAX_ADAPTERS)
    ]


def _ended(call: Mapping[str, Any]) -> float:
    return float(call["started"] + call["seconds"])
